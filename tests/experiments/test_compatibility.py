"""ControlNet and IP-Adapter beside a student: edges, agreement, what training touches, the command's whole road."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import CLIPModel
from typer.testing import CliRunner

from experiments import compatibility
from experiments.cli import app
from experiments.config import FitConfig, Grid
from experiments.data import open_dataset
from experiments.distill import open_context
from experiments.distill.context import DistillationContext, encode
from experiments.studies.compatibility import Plan, controlnet, ip_adapter, measure, run
from experiments.training import fit

ONE = FitConfig(steps=2, batch_size=2, learning_rate=1e-2, warmup=0)


def square(side: int = 32, low: int = 8, high: int = 24) -> torch.Tensor:
    """A white square on black: rows and columns low … high − 1."""
    image = -torch.ones(1, 3, side, side)
    image[..., low:high, low:high] = 1
    return image


@pytest.fixture
def setting(grid: Grid) -> DistillationContext:
    return open_context(grid.teacher, grid.data, 64, grid.distillation.images)


@pytest.fixture
def plan(grid: Grid) -> Plan:
    variant = grid.variants[1].model_copy(update={"mixer": "linfusion", "name": "linfusion", "label": "LinFusion"})
    small = grid.model_copy(update={"variants": (variant,)})
    sampling = measure.Sampling(pictures=2, sizes=(64,), steps=1)
    return Plan(grid=small, controlnet=ONE, ip_adapter=ONE, sampling=sampling)


def snapshot(pipe: object) -> dict[str, torch.Tensor]:
    return {n: v.clone() for n, v in pipe.unet.state_dict().items()}  # type: ignore[attr-defined]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def test_edges_of_a_square() -> None:
    found = controlnet.edges(square())[0, 0].bool()
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[7:25, 7:25] = True  # the pixels on either side of the outline …
    inside[9:23, 9:23] = False
    assert found.equal(inside)
    assert not controlnet.edges(torch.ones(1, 3, 16, 16)).any(), "a plain picture and its border have none"


def test_edges_between_colors_of_equal_brightness() -> None:
    image = torch.zeros(1, 3, 16, 16)
    image[:, 0, :, 8:], image[:, 1, :, :8] = 0.9, 0.9
    assert controlnet.edges(image).any()


def test_agreement() -> None:
    a, b, empty = (controlnet.edges(square(32, low, high)) for low, high in ((8, 24), (9, 25), (0, 32)))
    assert measure.f1(a, a).item() == pytest.approx(1)
    assert measure.f1(a, b).item() == pytest.approx(1), "one pixel off is within the tolerance"
    assert measure.f1(a, b, tolerance=0).item() < 1
    assert measure.f1(a, torch.zeros_like(a)).item() == measure.f1(torch.zeros_like(a), a).item() == 0
    assert measure.f1(empty, empty).item() == 1
    far = controlnet.edges(square(32, 13, 19))
    assert measure.f1(a, far).item() == 0
    assert measure.f1(torch.cat([a, a]), torch.cat([a, far])).tolist() == pytest.approx([1, 0])


def test_intervals() -> None:
    values = torch.rand(64, generator=torch.Generator().manual_seed(0)).tolist()
    found = measure.interval(values)
    assert found["low"] < found["mean"] < found["high"]
    assert found["high"] - found["low"] == pytest.approx(4 * 0.2887 / 8, rel=0.2)  # 2 · 1.96 · σ/√n
    assert found == measure.interval(values)
    shifted = measure.difference([v + 0.1 for v in values], values)
    assert shifted["low"] == pytest.approx(0.1) and shifted["high"] == pytest.approx(0.1)


def test_pictures_are_the_settings_pictures(setting: DistillationContext, grid: Grid) -> None:
    pictures = controlnet.pictures_of(open_dataset(grid.data, split="train"), 64, grid.distillation.images)
    latents, _ = encode(setting.pipe, torch.cat(pictures), [""] * len(setting.latents))
    assert torch.allclose(latents, setting.latents, atol=1e-5)


def test_training_a_controlnet_changes_nothing_else(setting: DistillationContext, tmp_path: Path) -> None:
    pipe = setting.pipe
    before = snapshot(pipe)
    model = controlnet.from_teacher(pipe.unet, pipe.vae_scale_factor)
    start = {n: v.clone() for n, v in model.state_dict().items()}
    maps = torch.ones(len(setting.latents), 1, 64, 64, dtype=torch.bool)
    batch = controlnet.batches(setting, maps, setting.text_states[0], ONE, 0.5)
    objective = controlnet.objective(pipe.unet, model, pipe.scheduler)
    assert {n.split(".")[1] for n, _ in objective.named_parameters()} == {"controlnet"}
    fit(objective, batch, ONE, tmp_path)
    assert same(before, snapshot(pipe))
    assert not same(start, model.state_dict())
    assert all(p.grad is None for p in pipe.unet.parameters())


def test_the_published_format_and_the_public_loader(setting: DistillationContext, tmp_path: Path) -> None:
    pipe = setting.pipe
    before, processors = snapshot(pipe), {n: type(p) for n, p in pipe.unet.attn_processors.items()}
    embeddings = torch.randn(len(setting.latents), 16)
    weights = ip_adapter.fresh(pipe, embeddings, setting.text_states)
    sites = len(ip_adapter.cross_attentions(pipe.unet))
    names = {f"{2 * k + 1}.to_{kv}_ip.weight" for k in range(sites) for kv in "kv"}
    assert set(weights["ip_adapter"]) == names and set(weights) == {"image_proj", "ip_adapter"}
    with ip_adapter.loaded(pipe, weights):
        assert same(ip_adapter.flat(weights), ip_adapter.flat(ip_adapter.loaded_weights(pipe.unet)))
        objective = ip_adapter.objective(pipe.unet, pipe.scheduler)
        trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
        assert trained == sum(v.numel() for v in ip_adapter.flat(weights).values())
        fit(objective, ip_adapter.batches(setting, embeddings, setting.text_states[0], ONE, 0.5, 0.5), ONE, tmp_path)
        after = ip_adapter.flat(ip_adapter.loaded_weights(pipe.unet))
    assert not any(after[k].equal(v) for k, v in ip_adapter.flat(weights).items()), "all of it learns"
    assert same(ip_adapter.flat(ip_adapter.nested(after)), after)
    assert same(before, snapshot(pipe))
    assert processors == {n: type(p) for n, p in pipe.unet.attn_processors.items()}


def test_an_ip_adapter_call_draws_from_one_picture() -> None:
    """diffusers would show every prompt of a call all the pictures given."""
    make = measure.picture_extras(torch.randn(3, 16))
    (embedding,) = make(slice(1, 2))["ip_adapter_image_embeds"]
    assert embedding.shape == (2, 1, 16) and not embedding[0].any()
    with pytest.raises(ValueError, match="one picture"):
        make(slice(0, 2))


def test_embeddings_at_any_size(tiny_teacher: Path) -> None:
    judge = CLIPModel.from_pretrained(tiny_teacher / "evaluator", dtype=torch.float32).eval()
    assert ip_adapter.embed(judge, square(128, 32, 96)).shape == ip_adapter.embed(judge, square(64)).shape == (1, 16)
    assert measure.likeness(judge, square(64), square(64)) == pytest.approx([1], abs=1e-5)


def test_the_command(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "default_plan", lambda share: plan)
    out = tmp_path / "run"
    done = CliRunner().invoke(app, ["compatibility", "--out", str(out)])
    assert done.exit_code == 0, done.output
    record = json.loads((out / "result.json").read_text())
    assert record["trace"].keys() and all(record["trace"].values())
    for part in ("controlnet", "ip_adapter"):
        assert [(row["split"], row["size"]) for row in record[part]] == [("train", 64), ("held_out", 64)]
        assert all(len(row["arms"][arm]["values"]) == 2 for row in record[part] for arm in run.ARMS)
    page = (out / "compatibility.md").read_text()
    assert "CC-BY 4.0" in page
    for picture in ("controlnet_64.png", "ip_adapter.png", "bars.png"):
        assert (out / "compatibility" / picture).is_file() and picture in page
    _started_again_it_does_nothing_twice(plan, out, record)


def _started_again_it_does_nothing_twice(plan: Plan, out: Path, record: dict) -> None:
    (out / "result.json").unlink()
    (gone := out / "samples" / "controlnet-train-64-student_with.safetensors").unlink()
    kept = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    again = run.run_compatibility(out, plan, lambda *_: None)
    assert again["controlnet"] == record["controlnet"] and gone.is_file()
    assert kept == {p: p.stat().st_mtime_ns for p in kept}
    compatibility.show(again, Console(quiet=True))
    with pytest.raises(ValueError, match="other settings"):
        run.run_compatibility(out, plan.model_copy(update={"seed": 1}), lambda *_: None)


def test_killed_training_goes_on(plan: Plan, setting: DistillationContext, tmp_path: Path) -> None:
    longer = plan.model_copy(update={"controlnet": ONE.model_copy(update={"steps": 3, "checkpoint_every": 1})})

    def stop(_what: str, done: int, _of: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    train: Callable[..., object] = run.train_controlnet
    train(longer, setting, tmp_path / "whole", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        train(longer, setting, tmp_path / "killed", stop)
    assert not (tmp_path / "killed" / "controlnet").exists()
    train(longer, setting, tmp_path / "killed", lambda *_: None)
    name = "controlnet/diffusion_pytorch_model.safetensors"
    assert same(load_file(tmp_path / "whole" / name), load_file(tmp_path / "killed" / name))


def test_shares_of_the_steps() -> None:
    whole, part = compatibility.default_plan(), compatibility.default_plan(0.1)
    assert part.controlnet.steps == round(whole.controlnet.steps * 0.1)
    assert part.grid.distillation.fit.steps == round(whole.grid.distillation.fit.steps * 0.1)
    assert compatibility.default_plan(0).ip_adapter.steps == 1
