"""Whatever a result depends on is part of the key of what is kept: change one thing, and the old state is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors import SafetensorError

from experiments.core.locks import LOCK, lock_folder
from experiments.data import ImageFolder
from experiments.distill import open_context
from experiments.distill.cache_builder import build_cache
from experiments.distill.recipe import DistillationRecipe
from experiments.distill.run import run_recipe
from experiments.teacher.load import load_teacher, open_teacher
from tests.unet_adapters import pipelines
from unet_adapters import files


def ignore(*_: object) -> None:
    """A callback that does nothing."""


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    folder = tmp_path / "teacher"
    pipelines.make().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (50 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("abcd"[number])
    return folder


@pytest.fixture
def recipe(teacher: Path, data: Path) -> DistillationRecipe:
    return DistillationRecipe.model_validate(
        {
            "name": "tiny",
            "about": "One step.",
            "teacher": str(teacher),
            "data": str(data),
            "mixer": {"name": "linfusion"},
            "distillation": {
                "objectives": {"output": 1.0},
                "image_size": 16,
                "images": 2,
                "fit": {"steps": 1, "batch_size": 2, "learning_rate": 1e-3},
            },
        }
    )


def change_weight(part: str) -> Callable[[Path, Path], None]:
    def change(teacher: Path, data: Path) -> None:
        pipe = load_teacher(str(teacher))
        largest = max(getattr(pipe, part).parameters(), key=lambda p: p.numel())
        largest.data.flatten()[-1] += 1e-3
        getattr(pipe, part).save_pretrained(teacher / part)

    return change


def change_schedule(teacher: Path, data: Path) -> None:
    scheduler = DDIMScheduler.from_pretrained(teacher / "scheduler")
    DDIMScheduler.from_config(scheduler.config, beta_end=0.05).save_pretrained(teacher / "scheduler")


def change_pixel(teacher: Path, data: Path) -> None:
    Image.new("RGB", (16, 16), (1, 2, 3)).save(data / "1.png")


def change_caption(teacher: Path, data: Path) -> None:
    (data / "1.txt").write_text("z")


def add_image(teacher: Path, data: Path) -> None:
    Image.new("RGB", (16, 16)).save(data / "9.png")
    (data / "9.txt").write_text("z")


CHANGES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "one weight of the UNet": (change_weight("unet"), "teacher"),
    "one weight of the autoencoder": (change_weight("vae"), "teacher"),
    "one weight of the text encoder": (change_weight("text_encoder"), "teacher"),
    "the noise schedule": (change_schedule, "teacher"),
    "one image": (change_pixel, "data"),
    "one caption": (change_caption, "data"),
    "an image more": (add_image, "data"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_is_not_continued_from_other_inputs(
    change: str, recipe: DistillationRecipe, teacher: Path, data: Path, tmp_path: Path
) -> None:
    run_recipe(recipe, tmp_path / "run", ignore)
    steps: list[object] = []
    run_recipe(recipe, tmp_path / "run", lambda *step: steps.append(step))
    assert not steps, "unchanged, it is finished"
    apply, name = CHANGES[change]
    apply(teacher, data)
    with pytest.raises(ValueError, match=f"a run of another {name}, see run.json"):
        run_recipe(recipe, tmp_path / "run", ignore)


@pytest.mark.parametrize("content", [None, "", "null", '{"recipe": '])
def test_checkpoints_of_an_unknown_training_are_not_continued(
    content: str | None, recipe: DistillationRecipe, tmp_path: Path
) -> None:
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    directory = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_recipe(longer(recipe), directory, kill)
    assert list(directory.rglob("checkpoints/*.safetensors"))
    if content is None:
        (directory / "run.json").unlink()
    else:
        (directory / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"Cannot continue in .*run.*run\.json"):
        run_recipe(longer(recipe), directory, ignore)


def longer(recipe: DistillationRecipe) -> DistillationRecipe:
    """With a checkpoint after each of two steps."""
    plan = recipe.distillation
    fit = plan.fit.model_copy(update={"steps": 2, "checkpoint_every": 1})
    return recipe.model_copy(update={"distillation": plan.model_copy(update={"fit": fit})})


@pytest.mark.parametrize("change", CHANGES)
def test_a_context_is_not_reused_for_other_inputs(change: str, teacher: Path, data: Path) -> None:
    arguments: Any = (str(teacher), str(data), 16, 2)
    first = open_context(*arguments)
    assert open_context(*arguments) is first
    CHANGES[change][0](teacher, data)
    assert open_context(*arguments) is not first


@pytest.mark.parametrize("argument", ["teacher", "data", "size", "images", "sizes"])
def test_a_context_is_not_reused_for_other_arguments(argument: str, teacher: Path, data: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"teacher": str(teacher), "data": str(data), "size": 16, "images": 2}
    first = open_context(**arguments)
    (tmp_path / "other").symlink_to(teacher if argument == "teacher" else data)
    changes: dict[str, dict[str, Any]] = {
        "teacher": {"teacher": str(tmp_path / "other")},
        "data": {"data": str(tmp_path / "other")},
        "size": {"size": 8},
        "images": {"images": 3},
        "sizes": {"more_sizes": (8,)},
    }
    arguments |= changes[argument]
    assert open_context(**arguments) is not first


@pytest.mark.parametrize("change", ["one image", "one caption", "one weight of the autoencoder"])
def test_a_cache_is_not_reused_for_other_inputs(change: str, teacher: Path, data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"sizes": [16], "images": 4}
    build_cache(open_teacher(str(teacher)), ImageFolder(data), tmp_path / "cache", **options)
    CHANGES[change][0](teacher, data)
    with pytest.raises(ValueError, match=r"has other contents: (records|teacher)"):
        build_cache(open_teacher(str(teacher)), ImageFolder(data), tmp_path / "cache", **options)


def test_a_folder_is_used_by_one_run_at_a_time(
    recipe: DistillationRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        lock_folder(tmp_path / "run", "distillation"),
        pytest.raises(ValueError, match=r"Another distillation is running in .*run\. Wait until it ends"),
    ):
        run_recipe(recipe, tmp_path / "run", ignore)
    assert run_recipe(recipe, tmp_path / "run", ignore).is_file()


def test_a_full_disk_is_an_oserror_and_loses_no_shard(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"sizes": [16], "images": 4, "shard": 2}
    save = files.save_file
    written: list[Path] = []

    def fill(tensors: Any, path: Path, **more: Any) -> None:
        if len(written) == 3:
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        written.append(path)
        save(tensors, path, **more)

    monkeypatch.setattr(files, "save_file", fill)
    with pytest.raises(OSError, match=r"Cannot write .*latents-16x16-00001.*No space left on device"):
        build_cache(open_teacher(str(teacher)), ImageFolder(data), tmp_path / "cache", **options)
    names = {path.name for path in (tmp_path / "cache").iterdir()} - {LOCK}
    assert names == {
        "building.json",
        "unconditional.safetensors",
        "latents-16x16-00000.safetensors",
        "text-00000.safetensors",
    }
    monkeypatch.setattr(files, "save_file", save)
    assert len(build_cache(open_teacher(str(teacher)), ImageFolder(data), tmp_path / "cache", **options)) == 4


# --- teachers that cannot be used -----------------------------------------------------------------


def save_with_unet(folder: Path, name: str = "text-to-image", **settings: Any) -> Path:
    pipe = pipelines.make(name)
    pipe.unet = type(pipe.unet).from_config(pipe.unet.config, **settings)
    pipe.save_pretrained(folder)
    return folder


def save_as(name: str) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        pipelines.make(name).save_pretrained(folder)
        return folder

    return save


def save_refiner_with_encoder(folder: Path) -> Path:
    """A refiner whose missing first text encoder was filled in."""
    return save_with_unet(folder, "SDXL", projection_class_embeddings_input_dim=8 * 5 + pipelines.WORDS)


def save_sample_prediction(folder: Path) -> Path:
    pipe = pipelines.make()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="sample")
    pipe.save_pretrained(folder)
    return folder


UNUSABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "inpainting": (lambda folder: save_with_unet(folder, in_channels=9), "takes 9 channels and its autoencoder has 4"),
    "InstructPix2Pix": (lambda folder: save_with_unet(folder, in_channels=8), "takes 8 channels"),
    "learned variance": (lambda folder: save_with_unet(folder, out_channels=8), "predicts 8 channels"),
    "upscaler": (lambda folder: save_with_unet(folder, num_class_embeds=1000), "classes or noise levels"),
    "SDXL refiner": (save_as("SDXL refiner"), "it has no text_encoder"),
    "SDXL refiner with an encoder": (save_refiner_with_encoder, "takes 5 micro-conditions"),
    "full LCM": (lambda folder: save_with_unet(folder, time_cond_proj_dim=8), "time_cond_proj_dim=8"),
    "sample prediction": (save_sample_prediction, "predicts 'sample'"),
}
GENERATES = {"full LCM", "sample prediction"}
"""Cannot be distilled, but can be sampled from."""


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_model_that_is_no_text_to_image_teacher_is_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    make, reason = UNUSABLE[kind]
    folder = str(make(tmp_path / "model"))
    with pytest.raises(ValueError, match=rf"^Cannot (load|distill) the teacher '.*model': .*{reason}") as error:
        open_teacher(folder)
    assert "\n" not in str(error.value)
    if kind in GENERATES:
        assert load_teacher(folder) is not None
    else:
        with pytest.raises(ValueError, match=reason):
            load_teacher(folder)


def test_half_precision_does_not_change_what_is_refused(tmp_path: Path) -> None:
    folder = save_with_unet(tmp_path / "model", in_channels=9)
    with pytest.raises(ValueError, match="takes 9 channels"):
        open_teacher(str(folder), torch.bfloat16)
