"""`mixlab generate` and `mixlab plan`: from the command line to a picture that tells how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from typer.testing import CliRunner

from experiments.cli import app
from experiments.highres import commands
from experiments.highres.models import Architecture
from experiments.highres.rate import measure_rate
from unet_adapters.hosts.unet_profiles import PROFILES

SMALL = ("--steps", "2", "--mixer", "linfusion")


def mixlab(*words: str) -> Any:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})


def test_a_killed_picture_goes_on_after_its_last_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, again = tmp_path / "plain.png", tmp_path / "again.png"
    words = ("generate", "red apple", "--size", "256x192", "--seed", "3", *SMALL)
    assert mixlab(*words, "--out", str(plain)).exit_code == 0
    told = commands._Bars.__call__

    def kill(self: Any, what: str, done: int, total: int) -> None:
        if what == "256 × 192":
            raise KeyboardInterrupt
        told(self, what, done, total)

    with monkeypatch.context() as patch:
        patch.setattr(commands._Bars, "__call__", kill)
        stopped = mixlab(*words, "--out", str(again))
    assert stopped.exit_code == 130 and "Start the same command again" in stopped.output and not again.exists()
    assert len(list((tmp_path / "again.stages").iterdir())) == 2
    went_on = mixlab(*words, "--out", str(again))
    assert went_on.exit_code == 0 and "Went on after 2 of 3 stages" in went_on.output
    with Image.open(plain) as one, Image.open(again) as other:
        assert one.size == (256, 192) and ImageChops.difference(one, other).getbbox() is None
        made = json.loads(one.text["mixers"])
    assert made["prompt"] == "red apple" and made["mode"] == "progressive" and made["seed"] == 3
    assert made["mixer"] == "linfusion" and made["model"] == "embedded"
    assert [stage["size"] for stage in made["stages"]] == [[48, 64], [96, 128], [192, 256]]


def test_a_direct_picture_tells_that_it_is(tmp_path: Path) -> None:
    out = tmp_path / "image.png"
    done = mixlab("generate", "sun", "--size", "96x96", "--mode", "direct", *SMALL, "--out", str(out))
    assert done.exit_code == 0
    with Image.open(out) as image:
        assert json.loads(image.text["mixers"])["mode"] == "direct"


def test_a_picture_made_larger(tmp_path: Path) -> None:
    given, out = tmp_path / "given.png", tmp_path / "image.png"
    Image.new("RGB", (64, 64), "red").save(given)
    done = mixlab("generate", "", "--size", "128x128", "--image", str(given), *SMALL, "--out", str(out))
    assert done.exit_code == 0, done.output
    with Image.open(out) as image:
        assert image.size == (128, 128) and len(json.loads(image.text["mixers"])["stages"]) == 2


def test_a_plan_is_a_table_and_too_small_a_budget_is_refused() -> None:
    done = mixlab("plan", "--size", "128x128", *SMALL)
    assert done.exit_code == 0 and "128 × 128" in done.output and "Denoising takes about" in done.output
    refused = mixlab("plan", "--size", "128x128", *SMALL, "--memory", "1MB")
    assert refused.exit_code == 2 and "does not fit in 1.00 MiB: with every saving it needs" in refused.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "big"), "--size 'big' is no size: expected width x height"),
        (("--size", "100x64"), "An image of 100 × 64 pixels cannot be made"),
        (("--memory", "lots"), "--memory 'lots' is no amount of memory"),
        (("--memory", "1MB"), "does not fit in 1.00 MiB"),
        (("--strengths", "a,b"), "--strengths 'a,b': expected numbers"),
        (("--strengths", "0.4,2"), "Expected strengths above 0 and up to 1"),
        (("--dtype", "int8"), "--dtype 'int8': expected one of float32"),
        (("--device", "toaster"), "--device 'toaster': expected cpu or cuda"),
        (("--mode", "sideways"), "Expected mode progressive or direct"),
        (("--enlarge", "words"), "enlarge pixels or latents"),
        (("--model", "random:SD-9"), "No architecture 'SD-9'"),
        (("--model", "nowhere/at-all"), "Cannot load the teacher 'nowhere/at-all'"),
        (("--adapter", "nowhere"), "nowhere"),
        (("--adapter", "a", "--mixer", "b"), "not both"),
        (("--mixer", "linfussion"), "linfusion"),
        (("--out", "image.jpg"), "ends in .png"),
        (("--image", "nowhere.png"), "--image nowhere.png: cannot be read as a picture"),
        (("--strength", "0.3"), "beside an --image"),
        (("--control", "x"), "A ControlNet needs both"),
    ],
)
def test_a_bad_option_is_one_sentence(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    out = () if "--out" in words else ("--out", str(tmp_path / "image.png"))
    done = mixlab("generate", "sun", "--size", "64x64", "--steps", "1", *out, *words)
    assert done.exit_code == 2, done.output
    assert message in done.output and "Traceback" not in done.output and done.output.count("error:") == 1


def test_too_little_memory_is_one_sentence() -> None:
    for error in (torch.OutOfMemoryError("…"), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(ValueError, match="memory was not enough"), commands._memory_told():
            raise error
    with pytest.raises(RuntimeError, match="else"), commands._memory_told():
        raise RuntimeError("something else")


@pytest.mark.parametrize("profile", [p for p in PROFILES if p.name in ("SDXL base", "SD-2.1")], ids=lambda p: p.name)
def test_an_architecture_is_what_a_pipeline_is_to_the_planner(profile: Any) -> None:
    pipe = Architecture(profile, torch.bfloat16, "cpu", filled=False)
    found = pipe.encode_prompt("sun")
    assert len(found) == (4 if profile.name == "SDXL base" else 2)
    assert found[0].shape == (1, 77, profile.config["cross_attention_dim"]) and pipe.vae.dtype == torch.float32


def test_a_rate_is_measured() -> None:
    with commands.Model(mixer="linfusion").opened() as (pipe, device):
        assert device == "cpu" and measure_rate(pipe, 64) > 1e6
