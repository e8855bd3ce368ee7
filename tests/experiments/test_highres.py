"""`mixlab generate` and `mixlab plan`: from the command line to an image whose metadata says how it was made."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from safetensors import SafetensorError
from typer.testing import CliRunner

from experiments.cli import app
from experiments.core.progress import ProgressLines
from experiments.core.signals import Interrupted
from experiments.highres import commands
from experiments.highres.options import open_image
from experiments.highres.pipelines import PipelineOptions
from experiments.highres.random_pipeline import RandomPipeline
from experiments.highres.throughput import measure_throughput
from unet_adapters.hosts.unet_profiles import PROFILES

SHORT = ("--steps", "2", "--mixer", "linfusion")


def mixlab(*words: str) -> Any:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})


def test_a_killed_run_resumes_after_its_last_stage(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = tmp_path / "uninterrupted.png"
    resumed = tmp_path / "resumed.png"
    words = ("generate", "red apple", "--model", str(tiny_teacher), "--size", "256x192", "--seed", "3", *SHORT)
    assert mixlab(*words, "--out", str(uninterrupted)).exit_code == 0
    update = ProgressLines.update

    def kill(self: Any, task: str, *values: Any) -> None:
        if task == "256 × 192":
            raise Interrupted("Terminated.", signal.SIGTERM)
        update(self, task, *values)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressLines, "update", kill)
        process = mixlab(*words, "--out", str(resumed))
    assert process.exit_code == 143 and not resumed.exists()
    assert "resumed.stages. Start the same command again to resume" in process.output
    assert len(list((tmp_path / "resumed.stages").iterdir())) == 2
    process = mixlab(*words, "--out", str(resumed))
    assert process.exit_code == 0 and "Resumed after 2 of 3 stages" in process.output
    with Image.open(uninterrupted) as one, Image.open(resumed) as other:
        assert one.size == (256, 192) and ImageChops.difference(one, other).getbbox() is None
        metadata = json.loads(one.text["mixers"])
    assert metadata["prompt"] == "red apple" and metadata["mode"] == "progressive" and metadata["seed"] == 3
    assert metadata["mixer"] == "linfusion" and metadata["model"] == str(tiny_teacher)
    assert [stage["size"] for stage in metadata["stages"]] == [[48, 64], [96, 128], [192, 256]]


def test_the_metadata_names_the_mode(tmp_path: Path) -> None:
    out = tmp_path / "image.png"
    process = mixlab("generate", "sun", "--size", "96x96", "--mode", "direct", *SHORT, "--out", str(out))
    assert process.exit_code == 0
    with Image.open(out) as image:
        metadata = json.loads(image.text["mixers"])
    assert metadata["mode"] == "direct" and metadata["model"] == "embedded"


def test_an_image_is_enlarged(tiny_teacher: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.png"
    out = tmp_path / "image.png"
    Image.new("RGB", (64, 64), "red").save(small)
    model = ("--model", str(tiny_teacher))
    process = mixlab("generate", "", *model, "--size", "128x128", "--image", str(small), *SHORT, "--out", str(out))
    assert process.exit_code == 0, process.output
    with Image.open(out) as image:
        assert image.size == (128, 128) and len(json.loads(image.text["mixers"])["stages"]) == 2


def test_an_image_is_read_as_upright_8_bit_rgb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # what this library writes exceeds Pillow's limit
    path = tmp_path / "ramp.png"
    Image.fromarray(np.linspace(0, 65535, 64 * 32).astype(np.uint16).reshape(32, 64)).save(path)
    ramp = np.asarray(open_image(path, "--image"))
    assert ramp.shape == (32, 64, 3) and abs(ramp.mean() - 127.5) < 1


def test_a_plan_is_a_table_and_refuses_too_small_a_budget(tiny_teacher: Path) -> None:
    words = ("plan", "--model", str(tiny_teacher), "--size", "128x128", *SHORT)
    process = mixlab(*words)
    assert process.exit_code == 0 and "128 × 128" in process.output and "Denoising takes about" in process.output
    process = mixlab(*words, "--memory", "1MB")
    assert process.exit_code == 2 and "does not fit in 1.00 MiB: with every saving it needs" in process.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "big"), "--size 'big' is not a size: expected width x height"),
        (("--size", "100x64"), "Cannot make an image of 100 × 64 pixels"),
        (("--memory", "lots"), "--memory 'lots' is not an amount of memory"),
        (("--memory", "1MB"), "does not fit in 1.00 MiB"),
        (("--memory", f"{'9' * 400}TB"), "is not an amount of memory"),
        (("--size", f"{'9' * 5000}x64"), "is not a size: expected width x height"),
        (("--strengths", "a,b"), "--strengths 'a,b': expected numbers"),
        (("--strengths", "0.4,2"), "Expected strengths above 0 and up to 1"),
        (("--dtype", "int8"), "--dtype 'int8': expected one of float32"),
        (("--device", "toaster"), "--device 'toaster': expected cpu or cuda"),
        (("--mode", "sideways"), "Unknown mode 'sideways': expected progressive or direct"),
        (("--upscale", "words"), "Unknown upscale 'words': expected pixels or latents"),
        (("--model", "random:SD-9"), "Unknown architecture 'SD-9'"),
        (("--model", "nowhere/at-all"), "Cannot load the teacher 'nowhere/at-all'"),
        (("--adapter", "nowhere"), "nowhere"),
        (("--adapter", "a", "--mixer", "b"), "not both"),
        (("--mixer", "linfussion"), "linfusion"),
        (("--out", "image.jpg"), "ends in .png"),
        (("--image", "nowhere.png"), "--image: nowhere.png cannot be read as an image"),
        (("--strength", "0.3"), "together with --image"),
        (("--control", "x"), "A ControlNet needs both"),
    ],
)
def test_an_invalid_option_is_one_sentence(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    out = () if "--out" in words else ("--out", str(tmp_path / "image.png"))
    process = mixlab("generate", "sun", "--size", "64x64", "--steps", "1", *out, *words)
    assert process.exit_code == 2, process.output
    assert message in process.output and "Traceback" not in process.output and process.output.count("error:") == 1


def test_an_interruption_before_the_first_stage_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "generate", stop)
    process = mixlab("generate", "sun", "--size", "64x64", "--out", str(tmp_path / "image.png"))
    assert process.exit_code == 130 and "No stage was finished." in process.output


def edit_config(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def inpainting(folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    edit_config(folder, "unet/config.json", in_channels=9)
    config = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")


def without_text_encoder(folder: Path) -> None:
    edit_config(folder, "model_index.json", text_encoder=[None, None])


def with_variant_files_only(folder: Path) -> None:
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "inpainting": (inpainting, "its UNet takes 9 channels and its autoencoder has 8"),
    "refiner": (without_text_encoder, "it has no text_encoder"),
    "variant": (with_variant_files_only, "only weights of the variant fp16: pass --variant fp16"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_used_is_one_sentence(name: str, tiny_teacher: Path, tmp_path: Path) -> None:
    change, message = MODELS[name]
    model = tmp_path / "model"
    shutil.copytree(tiny_teacher, model)
    change(model)
    commands_with_a_model = (
        ("plan", "--model", str(model), "--size", "64x64"),
        ("generate", "sun", "--model", str(model), "--size", "64x64", "--out", str(tmp_path / "image.png")),
        ("distill", "embedded", "--set", f"teacher={model}", "--out", str(tmp_path / "run")),
    )
    for words in commands_with_a_model:
        process = mixlab(*words)
        assert process.exit_code == 2 and message in process.output, process.output
        assert process.output.count("error:") == 1 and "Traceback" not in process.output


def test_a_variant_is_read(tiny_teacher: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_teacher, model)
    with_variant_files_only(model)
    process = mixlab("plan", "--model", str(model), "--variant", "fp16", "--size", "64x64")
    assert process.exit_code == 0, process.output


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("unet", "it is a UNet2DConditionModel, not a ControlNetModel"),
        ("other", "it has cross_attention_dim=24, but the model's UNet has"),
        ("nowhere", "cannot be loaded as a ControlNet"),
    ],
)
def test_a_controlnet_that_does_not_fit_is_one_sentence(
    source: str, message: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    from diffusers import ControlNetModel, UNet2DConditionModel

    network = ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained(tiny_teacher, subfolder="unet"))
    network.save_pretrained(tmp_path / "other")
    edit_config(tmp_path / "other", "config.json", cross_attention_dim=24)
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64)).save(image)
    folder = tiny_teacher / source if source == "unet" else tmp_path / source
    words = ("--model", str(tiny_teacher), "--control", str(folder), "--control-image", str(image))
    process = mixlab("generate", "sun", "--size", "64x64", "--steps", "1", "--out", str(tmp_path / "out.png"), *words)
    assert process.exit_code == 2 and message in process.output, process.output
    assert process.output.count("error:") == 1 and "Traceback" not in process.output


def test_a_full_disk_is_one_sentence(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: Any, path: Path, **_: Any) -> None:
        raise SafetensorError(f"I/O error: {os.strerror(errno.ENOSPC)}")

    monkeypatch.setattr("unet_adapters.files.save_file", fail)
    out = tmp_path / "image.png"
    model = ("--model", str(tiny_teacher))
    process = mixlab("generate", "sun", *model, "--size", "64x64", "--steps", "1", "--out", str(out))
    assert process.exit_code == 2 and "No space left on device" in process.output and not out.exists()
    assert process.output.count("error: Cannot write") == 1 and "Traceback" not in process.output


def test_out_of_memory_is_one_sentence() -> None:
    for error in (torch.OutOfMemoryError("…"), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(ValueError, match="Out of memory"), commands._explain_out_of_memory():
            raise error
    with pytest.raises(RuntimeError, match="else"), commands._explain_out_of_memory():
        raise RuntimeError("something else")


@pytest.mark.parametrize("profile", [p for p in PROFILES if p.name in ("SDXL base", "SD-2.1")], ids=lambda p: p.name)
def test_a_random_pipeline_encodes_prompts_as_a_real_one(profile: Any) -> None:
    pipe = RandomPipeline(profile, torch.bfloat16, "cpu", initialize=False)
    encoded = pipe.encode_prompt("sun")
    assert len(encoded) == (4 if profile.name == "SDXL base" else 2)
    assert encoded[0].shape == (1, 77, profile.config["cross_attention_dim"]) and pipe.vae.dtype == torch.float32


def test_throughput_is_measured() -> None:
    with PipelineOptions(mixer="linfusion").open() as (pipe, device):
        assert device == "cpu" and measure_throughput(pipe, 64) > 1e6
