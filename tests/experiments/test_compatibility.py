"""ControlNet and IP-Adapter with a student: edges, scores, what training changes, and the whole command."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import CLIPModel
from typer.testing import CliRunner

from experiments.cli import app
from experiments.config import FitConfig, Grid
from experiments.core.locks import lock_folder
from experiments.core.progress import ignore_progress
from experiments.data import open_dataset
from experiments.distill import open_context
from experiments.distill.context import DistillationContext
from experiments.studies import compatibility
from experiments.studies.compatibility import CompatibilityConfig, controlnet, ip_adapter, measure, run, training
from experiments.studies.compatibility.config import SamplingConfig
from experiments.studies.compatibility.sampling import image_prompt_arguments
from experiments.teacher.noise_schedules import create_noise_schedule
from experiments.training import fit

ONE = FitConfig(steps=2, batch_size=2, learning_rate=1e-2, warmup=0)


def square(side: int = 32, low: int = 8, high: int = 24) -> torch.Tensor:
    """A white square on black: rows and columns low … high − 1."""
    image = -torch.ones(1, 3, side, side)
    image[..., low:high, low:high] = 1
    return image


@pytest.fixture
def context(grid: Grid) -> DistillationContext:
    return open_context(grid.teacher, grid.data, 64, grid.distillation.images)


@pytest.fixture
def config(grid: Grid) -> CompatibilityConfig:
    variant = grid.variants[1].model_copy(update={"mixer": "linfusion", "name": "linfusion", "label": "LinFusion"})
    small = grid.model_copy(update={"variants": (variant,)})
    sampling = SamplingConfig(images=2, sizes=(64,), steps=1)
    return CompatibilityConfig(grid=small, controlnet=ONE, ip_adapter=ONE, sampling=sampling)


def snapshot(pipe: object) -> dict[str, torch.Tensor]:
    return {n: v.clone() for n, v in pipe.unet.state_dict().items()}  # type: ignore[attr-defined]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def test_edges_of_a_square() -> None:
    detected = controlnet.detect_edges(square())[0, 0].bool()
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[7:25, 7:25] = True  # the pixels on either side of the outline …
    inside[9:23, 9:23] = False
    assert detected.equal(inside)
    assert not controlnet.detect_edges(torch.ones(1, 3, 16, 16)).any(), "a plain image and its border have none"


def test_edges_between_colors_of_equal_brightness() -> None:
    image = torch.zeros(1, 3, 16, 16)
    image[:, 0, :, 8:] = 0.9
    image[:, 1, :, :8] = 0.9
    assert controlnet.detect_edges(image).any()


def test_edge_f1() -> None:
    a, b, empty = (controlnet.detect_edges(square(32, low, high)) for low, high in ((8, 24), (9, 25), (0, 32)))
    assert measure.edge_f1(a, a).item() == pytest.approx(1)
    assert measure.edge_f1(a, b).item() == pytest.approx(1), "one pixel off is within the tolerance"
    assert measure.edge_f1(a, b, tolerance=0).item() < 1
    assert measure.edge_f1(a, torch.zeros_like(a)).item() == measure.edge_f1(torch.zeros_like(a), a).item() == 0
    assert measure.edge_f1(empty, empty).item() == 1
    far = controlnet.detect_edges(square(32, 13, 19))
    assert measure.edge_f1(a, far).item() == 0
    assert measure.edge_f1(torch.cat([a, a]), torch.cat([a, far])).tolist() == pytest.approx([1, 0])


def test_intervals() -> None:
    values = torch.rand(64, generator=torch.Generator().manual_seed(0)).tolist()
    interval = measure.mean_interval(values)
    assert interval["low"] < interval["mean"] < interval["high"]
    assert interval["high"] - interval["low"] == pytest.approx(4 * 0.2887 / 8, rel=0.2)  # 2 · 1.96 · σ/√n
    assert interval == measure.mean_interval(values)
    shifted = measure.paired_difference([v + 0.1 for v in values], values)
    assert shifted["low"] == pytest.approx(0.1) and shifted["high"] == pytest.approx(0.1)


def test_training_images_are_those_of_the_context(context: DistillationContext, grid: Grid) -> None:
    images = controlnet.training_images(open_dataset(grid.data, split="train"), 64, grid.distillation.images)
    latents = context.teacher.encode(torch.cat(images), [""] * len(context.latents))["latents"]
    assert torch.allclose(latents, context.latents, atol=1e-5)


def test_training_a_controlnet_changes_nothing_else(context: DistillationContext, tmp_path: Path) -> None:
    pipe = context.pipe
    before = snapshot(pipe)
    model = controlnet.create_controlnet(pipe.unet, pipe.vae_scale_factor)
    start = {n: v.clone() for n, v in model.state_dict().items()}
    maps = torch.ones(len(context.latents), 1, 64, 64, dtype=torch.bool)
    batch = controlnet.controlnet_batches(context, maps, context.text_states[0], ONE, 0.5)
    objective = controlnet.controlnet_loss(pipe.unet, model, create_noise_schedule(pipe.scheduler))
    assert {n.split(".")[1] for n, _ in objective.named_parameters()} == {"controlnet"}
    fit(objective, batch, ONE, tmp_path)
    assert same(before, snapshot(pipe))
    assert not same(start, model.state_dict())
    assert all(p.grad is None for p in pipe.unet.parameters())


def test_the_published_format_and_the_public_loader(context: DistillationContext, tmp_path: Path) -> None:
    pipe = context.pipe
    before = snapshot(pipe)
    processors = {n: type(p) for n, p in pipe.unet.attn_processors.items()}
    embeddings = torch.randn(len(context.latents), 16)
    weights = ip_adapter.initial_weights(pipe, embeddings, context.text_states)
    sites = len(ip_adapter.cross_attention_names(pipe.unet))
    names = {f"{2 * k + 1}.to_{kv}_ip.weight" for k in range(sites) for kv in "kv"}
    assert set(weights["ip_adapter"]) == names and set(weights) == {"image_proj", "ip_adapter"}
    with ip_adapter.ip_adapter_loaded(pipe, weights):
        assert same(ip_adapter.flatten_weights(weights), ip_adapter.flatten_weights(ip_adapter.read_weights(pipe.unet)))
        objective = ip_adapter.ip_adapter_loss(pipe.unet, create_noise_schedule(pipe.scheduler))
        trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
        assert trained == sum(v.numel() for v in ip_adapter.flatten_weights(weights).values())
        fit(
            objective,
            ip_adapter.ip_adapter_batches(context, embeddings, context.text_states[0], ONE, 0.5, 0.5),
            ONE,
            tmp_path,
        )
        after = ip_adapter.flatten_weights(ip_adapter.read_weights(pipe.unet))
    assert not any(after[k].equal(v) for k, v in ip_adapter.flatten_weights(weights).items()), "all of it learns"
    assert same(ip_adapter.flatten_weights(ip_adapter.unflatten_weights(after)), after)
    assert same(before, snapshot(pipe))
    assert processors == {n: type(p) for n, p in pipe.unet.attn_processors.items()}


def test_an_ip_adapter_call_takes_one_image() -> None:
    """diffusers would show every prompt of a call all the images given."""
    arguments = image_prompt_arguments(torch.randn(3, 16))
    (embedding,) = arguments(slice(1, 2))["ip_adapter_image_embeds"]
    assert embedding.shape == (2, 1, 16) and not embedding[0].any()
    with pytest.raises(ValueError, match="expected one"):
        arguments(slice(0, 2))


def test_embeddings_at_any_size(tiny_teacher: Path) -> None:
    clip = CLIPModel.from_pretrained(tiny_teacher / "evaluator", dtype=torch.float32).eval()
    assert (
        ip_adapter.embed_images(clip, square(128, 32, 96)).shape
        == ip_adapter.embed_images(clip, square(64)).shape
        == (1, 48)
    )
    assert measure.clip_similarity(clip, square(64), square(64)) == pytest.approx([1], abs=1e-5)


def test_the_command(config: CompatibilityConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "default_config", lambda share: config)
    out = tmp_path / "run"
    invocation = CliRunner().invoke(app, ["compatibility", "--out", str(out)])
    assert invocation.exit_code == 0, invocation.output
    result = json.loads((out / "result.json").read_text())
    assert result["checks"].keys() and all(result["checks"].values())
    for part in ("controlnet", "ip_adapter"):
        assert [(row["split"], row["size"]) for row in result[part]] == [("train", 64), ("held_out", 64)]
        assert all(len(row["arms"][arm]["values"]) == 2 for row in result[part] for arm in run.ARMS)
    page = (out / "compatibility.md").read_text()
    assert "CC-BY 4.0" in page
    for figure in ("controlnet_64.png", "ip_adapter.png", "bars.png"):
        assert (out / "compatibility" / figure).is_file() and figure in page
    _started_again_it_repeats_nothing(config, out, result)


def _started_again_it_repeats_nothing(config: CompatibilityConfig, out: Path, result: dict) -> None:
    missing = out / "samples" / "controlnet-train-64-student_with.safetensors"
    (out / "result.json").unlink()
    missing.unlink()
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = run.run_compatibility(out, config, ignore_progress)
    assert again["controlnet"] == result["controlnet"] and missing.is_file()
    assert times == {path: path.stat().st_mtime_ns for path in times}
    compatibility.print_summary(again, Console(quiet=True))
    with pytest.raises(ValueError, match="another configuration"):
        run.run_compatibility(out, config.model_copy(update={"seed": 1}), ignore_progress)


@pytest.mark.parametrize("changed", ["teacher", "judge", "data", "plugin source"])
def test_a_run_is_not_continued_from_other_inputs(
    changed: str, config: CompatibilityConfig, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration names its teacher and data, which an update of the package may replace."""
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    config = config.model_copy(update={"grid": config.grid.model_copy(update={"teacher": str(teacher)})})
    monkeypatch.setattr(run, "train_models", lambda *_: {})
    monkeypatch.setattr(run, "_measure", lambda *_: {})
    run.run_compatibility(tmp_path / "run", config, ignore_progress)
    run.run_compatibility(tmp_path / "run", config, ignore_progress)
    weights = {
        "teacher": teacher / "unet" / "diffusion_pytorch_model.safetensors",
        "judge": teacher / "evaluator" / "model.safetensors",
    }
    if changed in weights:
        tensors = load_file(weights[changed])
        save_file({name: tensor * 2 for name, tensor in tensors.items()}, weights[changed], {"format": "pt"})
    else:
        functions = {"data": "digest_records", "plugin source": "training_sources"}
        monkeypatch.setattr(run, functions[changed], lambda *_: "another")
    with pytest.raises(ValueError, match=f"a run of another {changed}, see run.json"):
        run.run_compatibility(tmp_path / "run", config, ignore_progress)


def test_a_folder_is_used_by_one_run_at_a_time(config: CompatibilityConfig, tmp_path: Path) -> None:
    with (
        lock_folder(tmp_path, "compatibility study"),
        pytest.raises(ValueError, match="Another compatibility study is running"),
    ):
        run.run_compatibility(tmp_path, config, ignore_progress)


@pytest.mark.parametrize("part", ["controlnet", "ip_adapter"])
def test_a_full_disk_is_one_sentence(
    part: str, config: CompatibilityConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors raises an error of its own, which is no OSError; nothing half-written stays."""

    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    functions = {
        "controlnet": "safetensors.torch.save_file",
        "ip_adapter": "unet_adapters.files.save_file",
    }
    train = getattr(training, f"train_{part}")

    def train_on_a_full_disk(*arguments: object) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(functions[part], fail)
            return train(*arguments)

    monkeypatch.setattr(training, f"train_{part}", train_on_a_full_disk)
    monkeypatch.setattr(compatibility, "default_config", lambda share: config)
    invocation = CliRunner().invoke(app, ["compatibility", "--out", str(tmp_path)])
    assert invocation.exit_code == 2, invocation.output
    assert "No space left on device" in invocation.output and "Traceback" not in invocation.output
    assert not list(tmp_path.rglob("*.partial"))
    finished = {"controlnet": "controlnet", "ip_adapter": "ip_adapter.safetensors"}
    assert not (tmp_path / finished[part]).exists()


def test_a_killed_training_continues(config: CompatibilityConfig, context: DistillationContext, tmp_path: Path) -> None:
    longer = config.model_copy(update={"controlnet": ONE.model_copy(update={"steps": 3, "checkpoint_every": 1})})

    def interrupt(_phase: str, done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    train: Callable[..., object] = training.train_controlnet
    train(longer, context, tmp_path / "whole", ignore_progress)
    with pytest.raises(KeyboardInterrupt):
        train(longer, context, tmp_path / "killed", interrupt)
    assert not (tmp_path / "killed" / "controlnet").exists()
    train(longer, context, tmp_path / "killed", ignore_progress)
    name = "controlnet/diffusion_pytorch_model.safetensors"
    assert same(load_file(tmp_path / "whole" / name), load_file(tmp_path / "killed" / name))


def test_a_share_of_the_steps() -> None:
    whole = compatibility.default_config()
    part = compatibility.default_config(0.1)
    assert part.controlnet.steps == round(whole.controlnet.steps * 0.1)
    assert part.grid.distillation.fit.steps == round(whole.grid.distillation.fit.steps * 0.1)
    assert compatibility.default_config(0).ip_adapter.steps == 1
