"""`mixlab generate` and `mixlab plan`: an image with its story, a stop that costs one stage, sentences."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from experiments.cli import app
from experiments.highres.units import parse_bytes, parse_size

SHORT = ("--steps", "3", "--guidance", "3", "--mixer", "linear_attention")


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments))
    assert "Traceback" not in done.output and (done.exception is None or isinstance(done.exception, SystemExit))
    return done.exit_code, " ".join(done.output.split())


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_sizes_are_width_then_height(width: int, height: int) -> None:
    assert parse_size(f"{width}x{height}") == parse_size(f" {width} × {height} ") == (height, width)


def test_amounts_of_memory() -> None:
    assert parse_bytes("24GB") == parse_bytes("24 GiB") == parse_bytes("24g") == 24 * 2**30
    assert parse_bytes("1.5M") == 3 * 2**19
    for wrong in ("24", "GB", "1.2.3GB", "-1GB"):
        with pytest.raises(ValueError, match="as in 24GB"):
            parse_bytes(wrong)


def test_an_image_tells_how_it_was_made_and_a_second_start_finds_its_stages(tmp_path: Path) -> None:
    out = tmp_path / "apple.png"
    command = ("generate", "red apple, teal background", "--size", "96x64", "--out", str(out), *SHORT)
    code, told = run(*command)
    assert code == 0 and "48 × 32" in told and "96 × 64" in told, told
    with Image.open(out) as image:
        assert image.size == (96, 64)
        story, first = json.loads(image.text["mixers"]), image.tobytes()  # type: ignore[attr-defined]
    assert story["mode"] == "progressive" and story["prompt"] == "red apple, teal background" and story["steps"] == 3
    assert [stage["size"] for stage in story["stages"]] == [[32, 48], [64, 96]]
    out.unlink()
    next((tmp_path / "apple.stages").glob("*64x96*")).unlink()  # as if it had been killed in the last stage
    code, told = run(*command)
    assert code == 0 and "1 of 2 stages were there" in told
    with Image.open(out) as image:
        assert image.tobytes() == first


def test_a_picture_is_enlarged(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "small.png")
    out = tmp_path / "large.png"
    code, told = run(
        "generate", "sea", "--size", "128x128", "--image", str(tmp_path / "small.png"), "--out", str(out), *SHORT
    )
    assert code == 0 and Image.open(out).size == (128, 128), told


def test_a_plan_says_what_fits() -> None:
    code, told = run("plan", "--size", "256x128", "--mixer", "linfusion", "--memory", "24GB")
    assert code == 0 and "256 × 128" in told and "Savings:" in told, told
    code, told = run("plan", "--size", "256x128", "--mixer", "linfusion", "--memory", "1MB")
    assert code == 2 and "with every saving it needs" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--size", "large"], "expected width x height"),
        (["--size", "100x100"], "multiple"),
        (["--memory", "much"], "as in 24GB"),
        (["--model", "random:SD-9"], "No architecture 'SD-9'"),
        (["--mixer", "linfuson"], "linfusion"),
        (["--adapter", "nowhere"], "nowhere"),
        (["--mode", "fast"], "progressive or direct"),
        (["--device", "tpu"], "No device 'tpu'"),
        (["--dtype", "int8"], "No dtype 'int8'"),
        (["--image", "none.png"], "Cannot read the picture"),
        (["--strength", "0.5"], "give one with --image"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(options: list[str], told: str, tmp_path: Path) -> None:
    code, output = run("generate", "sea", "--out", str(tmp_path / "x.png"), "--steps", "1", "--size", "64x64", *options)
    assert code == 2 and told in output, output
    assert not (tmp_path / "x.png").exists()
