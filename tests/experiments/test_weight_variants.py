"""`--variant fp16` in every command that loads a model: a folder with `*.fp16.safetensors` only is a model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from typer.testing import CliRunner

from experiments.cli import app
from experiments.distill.context import open_context
from experiments.teacher.load import load_teacher, open_teacher
from tests.experiments.students import student

GRID = """
from experiments.config import DistillationConfig, EvaluationConfig, FitConfig, Grid, Variant
GRID = Grid(
    name="tiny",
    question="?",
    variants=(Variant(name="softmax", label="softmax", mixer="softmax", trained=False),),
    distillation=DistillationConfig(fit=FitConfig(steps=1, batch_size=2, learning_rate=1e-3), images=2),
    evaluation=EvaluationConfig(),
)
"""
MEASURE_LITTLE = (
    "sizes=[64]",
    "shapes=[]",
    "images=1",
    "held_in_images=0",
    "timesteps=[500]",
    "sample_steps=1",
    'prompts=["red apple"]',
    "sample_sizes=[64]",
    "generated.images=0",
    'metrics={"fidelity": {}}',
)
TRAIN_LITTLE = ("fit.steps=1", "fit.batch_size=2", "images=2", "before=[]")


@pytest.fixture(scope="module")
def model(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher whose weights are of the variant fp16 only."""
    folder = tmp_path_factory.mktemp("variant") / "model"
    shutil.copytree(tiny_teacher, folder)
    rename_weights(folder)
    return folder


def rename_weights(folder: Path) -> None:
    for path in folder.glob("**/*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))


def settings(prefix: str, values: tuple[str, ...]) -> list[str]:
    return [word for value in values for word in ("--set", f"{prefix}{value}")]


def command(name: str, model: Path, folder: Path) -> list[str]:
    """The words of a short run of a command; adapters and prompts are written to the folder."""
    out = str(folder / "out")
    if name == "plan":
        return ["plan", "--size", "64x64", "--steps", "1", "--model", str(model)]
    if name == "generate":
        return ["generate", "sun", "--size", "64x64", "--steps", "1", "--model", str(model), "--out", f"{out}.png"]
    if name == "evaluate":
        student(open_teacher(str(model), variant="fp16")).save_pretrained(folder / "adapter")
        measured = settings("", MEASURE_LITTLE)
        return ["evaluate", str(folder / "adapter"), "--teacher", str(model), "--out", out, *measured]
    if name == "export":
        (folder / "prompts").mkdir()
        (folder / "prompts" / "0.txt").write_text("red apple")
        words = ["export", str(folder / "prompts"), "--layout", "dpg", "--teacher", str(model), "--out", out]
        return [*words, *settings("", ("sample_steps=1",))]
    if name == "distill":
        trained = settings("distillation.", TRAIN_LITTLE)
        return ["distill", "embedded", "--set", f"teacher={model}", "--out", out, *trained]
    (folder / "grid.py").write_text(GRID)
    measured = settings("evaluation.", MEASURE_LITTLE)
    return ["ablate", str(folder / "grid.py"), "--teacher", str(model), "--out", out, *measured]


@pytest.mark.parametrize("name", ["plan", "generate", "evaluate", "export", "distill", "ablate"])
def test_a_variant_is_asked_for_and_read(name: str, model: Path, tmp_path: Path) -> None:
    words = command(name, model, tmp_path)
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2, refused.output
    assert "only weights of the variant fp16: pass --variant fp16" in " ".join(refused.output.split())
    assert refused.output.count("error:") == 1 and "Traceback" not in refused.output
    done = CliRunner().invoke(app, [*words, "--variant", "fp16"])
    assert done.exit_code == 0, done.output


def test_the_variant_decides_which_weights_are_opened(model: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """A folder with both: each is read, and a context of one is not reused for the other."""
    both = tmp_path / "both"
    shutil.copytree(tiny_teacher, both)
    pipe = load_teacher(str(tiny_teacher))
    for parameter in pipe.unet.parameters():
        parameter.data.zero_()
    pipe.save_pretrained(both, variant="fp16")
    sums = {}
    for variant in (None, "fp16", None):
        context = open_context(str(both), "emoji", 64, images=2, variant=variant)
        sums[variant] = sum(float(p.abs().sum()) for p in context.pipe.unet.parameters())
    assert sums["fp16"] == 0 < sums[None]


@pytest.mark.parametrize("controlnet", ["plain", "fp16"])
def test_a_controlnet_is_read_with_the_weights_it_has(
    controlnet: str, tiny_teacher: Path, model: Path, tmp_path: Path
) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_teacher, subfolder="unet")
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8))
    network.save_pretrained(tmp_path / "control")
    if controlnet == "fp16":
        rename_weights(tmp_path / "control")
    Image.new("RGB", (64, 64)).save(tmp_path / "edges.png")
    words = command("generate", model, tmp_path)
    words += ["--control", str(tmp_path / "control"), "--control-image", str(tmp_path / "edges.png")]
    done = CliRunner().invoke(app, [*words, "--variant", "fp16"])
    assert done.exit_code == 0, done.output
