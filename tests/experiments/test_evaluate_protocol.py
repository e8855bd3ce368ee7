"""The frozen protocol: what changes its hash, what is refused, and that every number carries it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from experiments.ablation import run_grid
from experiments.ablation.cell import setting_of
from experiments.config import EvaluationConfig, Grid, ImageMetricsConfig, apply_overrides
from experiments.distill import DistillationContext, open_context
from experiments.evaluate.protocol import FILE, differences, freeze, protocol_of


@pytest.fixture
def setting(grid: Grid) -> DistillationContext:
    return open_context(grid.teacher, grid.data, 64, grid.distillation.images)


def test_it_is_written_once_and_then_held_to(setting: DistillationContext, grid: Grid, tmp_path: Path) -> None:
    plan = grid.evaluation
    first = freeze(protocol_of(setting, plan, grid.data), tmp_path)
    text = (tmp_path / FILE).read_text()
    written = json.loads(text)
    assert written["hash"] == first and written["prompts"] == list(plan.prompts) and written["version"] == 1
    assert {"prompts_sha256", "seeds", "sampler", "resize", "image_format", "data", "teacher"} < set(written)
    assert freeze(protocol_of(setting, plan, grid.data), tmp_path) == first
    other = plan.model_copy(update={"sample_steps": 3, "prompts": ("blue heart",), "timesteps": (100,)})
    with pytest.raises(ValueError, match="another protocol") as told:
        freeze(protocol_of(setting, other, grid.data), tmp_path)
    message = str(told.value)
    assert "sampler.steps was 2 and is now 3" in message and 'prompts was ["red apple' in message
    assert "evaluation.timesteps was [500] and is now [100]" in message and "sha256" not in message
    assert (tmp_path / FILE).read_text() == text
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ValueError, match="Cannot read the protocol"):
        freeze(protocol_of(setting, plan, grid.data), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"guidance": 4.0},
        {"guidances": (5.0,)},
        {"sizes": (64,)},
        {"images": 3},
        {"metrics": ImageMetricsConfig(images=2)},
        {"metrics": ImageMetricsConfig(images=2, resize=32)},
    ],
)
def test_what_is_asked_for_is_in_the_hash(setting: DistillationContext, grid: Grid, change: dict[str, object]) -> None:
    plan = grid.evaluation
    changed: EvaluationConfig = plan.model_copy(update=change)
    before, after = (protocol_of(setting, p, grid.data) for p in (plan, changed))
    assert before.hash != after.hash
    assert differences(before.model_dump(mode="json"), after.model_dump(mode="json"))


@contextmanager
def another_teacher(setting: DistillationContext) -> Iterator[None]:
    bias = setting.pipe.unet.conv_out.bias
    kept = bias.detach().clone()
    protocol_of.cache_clear()
    try:
        with torch.no_grad():
            bias.add_(1)
        yield
    finally:
        with torch.no_grad():
            bias.copy_(kept)
        protocol_of.cache_clear()


def test_the_teacher_s_unet_is_in_the_hash(setting: DistillationContext, grid: Grid) -> None:
    before = protocol_of(setting, grid.evaluation, grid.data)
    with another_teacher(setting):
        changed = protocol_of(setting, grid.evaluation, grid.data)
    assert differences(before.model_dump(mode="json"), changed.model_dump(mode="json"))[0].startswith("teacher was")
    assert protocol_of(setting, grid.evaluation, grid.data) == before


def test_a_run_s_cells_share_a_protocol(grid: Grid, tmp_path: Path) -> None:
    def quiet(*_: object) -> None:
        pass

    def written() -> str:
        found: str = json.loads((tmp_path / FILE).read_text())["hash"]
        return found

    only = grid.model_copy(update={"variants": grid.variants[:1]})
    (record,) = run_grid(only, tmp_path, quiet)
    assert record["protocol"] == written()
    more = grid.model_copy(update={"variants": grid.variants[:1], "seeds": (0, 1)})
    assert [r["protocol"] for r in run_grid(more, tmp_path, quiet)] == [record["protocol"]], "seeds may be added"
    with another_teacher(setting_of(only)), pytest.raises(ValueError, match="another protocol: teacher was"):
        run_grid(only, tmp_path, quiet)
    (other,) = run_grid(apply_overrides(only, ["evaluation.images=3"]), tmp_path, quiet)
    assert other["protocol"] == written() != record["protocol"], "another evaluation makes other cells"
