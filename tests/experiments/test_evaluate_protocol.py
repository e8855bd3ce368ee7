"""The frozen protocol: what changes its hash, what is refused, and that every number carries it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from experiments.ablation.cell import open_cell_context
from experiments.ablation.run import run_grid
from experiments.config import EvaluationConfig, GeneratedImagesConfig, Grid, apply_overrides
from experiments.distill import DistillationContext, open_context
from experiments.evaluate.protocol import FILE, differences, freeze_protocol, protocol_of
from tests.experiments.test_ablation import ignore


@pytest.fixture
def context(grid: Grid) -> DistillationContext:
    return open_context(grid.teacher, grid.data, 64, grid.distillation.images)


def test_it_is_written_once_and_then_enforced(context: DistillationContext, grid: Grid, tmp_path: Path) -> None:
    plan = grid.evaluation
    first = freeze_protocol(protocol_of(context, plan, grid.data), tmp_path)
    text = (tmp_path / FILE).read_text()
    written = json.loads(text)
    assert written["hash"] == first and written["prompts"] == list(plan.prompts) and written["version"] == 2
    assert {"prompts_sha256", "seeds", "sampler", "resize", "image_format", "data", "teacher"} < set(written)
    assert freeze_protocol(protocol_of(context, plan, grid.data), tmp_path) == first
    other = plan.model_copy(update={"sample_steps": 3, "prompts": ("blue heart",), "timesteps": (100,)})
    with pytest.raises(ValueError, match="another protocol") as raised:
        freeze_protocol(protocol_of(context, other, grid.data), tmp_path)
    message = str(raised.value)
    assert "sampler.steps was 2 and is now 3" in message and 'prompts was ["a red apple' in message
    assert "evaluation.timesteps was [500] and is now [100]" in message and "sha256" not in message
    assert (tmp_path / FILE).read_text() == text
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ValueError, match="Cannot read the protocol"):
        freeze_protocol(protocol_of(context, plan, grid.data), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"guidance": 4.0},
        {"guidances": (5.0,)},
        {"sizes": (64,)},
        {"images": 3},
        {"held_in_images": 1},
        {"timesteps": (500, 999)},
        {"metrics": {"fidelity": {}}},
        {"generated": GeneratedImagesConfig(images=2)},
        {"generated": GeneratedImagesConfig(images=2, resize=32)},
    ],
)
def test_every_setting_is_in_the_hash(context: DistillationContext, grid: Grid, change: dict[str, object]) -> None:
    plan = grid.evaluation
    changed: EvaluationConfig = plan.model_copy(update=change)
    before, after = (protocol_of(context, p, grid.data) for p in (plan, changed))
    assert before.hash != after.hash
    assert differences(before.model_dump(mode="json"), after.model_dump(mode="json"))


@contextmanager
def another_teacher(context: DistillationContext) -> Iterator[None]:
    bias = context.pipe.unet.conv_out.bias
    original = bias.detach().clone()
    try:
        with torch.no_grad():
            bias.add_(1)
        yield
    finally:
        with torch.no_grad():
            bias.copy_(original)


def test_the_teachers_weights_are_in_the_hash(context: DistillationContext, grid: Grid) -> None:
    """Also if they change in place, in a process that has computed the hash before."""
    before = protocol_of(context, grid.evaluation, grid.data)
    with another_teacher(context):
        changed = protocol_of(context, grid.evaluation, grid.data)
    assert differences(before.model_dump(mode="json"), changed.model_dump(mode="json"))[0].startswith("teacher was")
    assert protocol_of(context, grid.evaluation, grid.data) == before


def test_the_cells_of_a_run_share_a_protocol(grid: Grid, tmp_path: Path) -> None:
    def written() -> str:
        record: str = json.loads((tmp_path / FILE).read_text())["hash"]
        return record

    def protocols(run: Grid) -> list[str]:
        return [r.measurements.protocol for r in run_grid(run, tmp_path, ignore) if r.measurements]

    only = grid.model_copy(update={"variants": grid.variants[:1]})
    (protocol,) = protocols(only)
    assert protocol == written()
    more = grid.model_copy(update={"variants": grid.variants[:1], "seeds": (0, 1)})
    assert protocols(more) == [protocol], "seeds may be added"
    with another_teacher(open_cell_context(only)), pytest.raises(ValueError, match="another protocol: teacher was"):
        run_grid(only, tmp_path, ignore)
    (other,) = protocols(apply_overrides(only, ["evaluation.images=3"]))
    assert other == written() != protocol, "another evaluation makes other cells"
