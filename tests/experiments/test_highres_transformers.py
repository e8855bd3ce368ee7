"""`mixlab plan` and `mixlab generate` with diffusion transformers that are read from a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from experiments.cli import app
from tests.unet_adapters.transformer_pipelines import PIPELINES

BASE_SIZES = {"PixArt": 16, "SD3.5 medium": 32, "Flux": 32}


@pytest.fixture(scope="module", params=BASE_SIZES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformers")
    PIPELINES[kind]().save_pretrained(folder)
    return folder


def mixlab(command: str, *words: str, folder: Path, base_size: int) -> Any:
    size = ("--size", f"{2 * base_size}x{base_size}", "--base-size", str(base_size))
    options = (*size, "--model", str(folder), "--mixer", "linfusion", "--steps", "2", "--guidance", "3.5")
    return CliRunner().invoke(app, [command, *words, *options], env={"COLUMNS": "200"})


def test_an_image_is_written_with_its_metadata(kind: str, folder: Path, tmp_path: Path) -> None:
    base_size = BASE_SIZES[kind]
    out = tmp_path / "image.png"
    process = mixlab("generate", "a b c", "--out", str(out), "--seed", "3", folder=folder, base_size=base_size)
    assert process.exit_code == 0, process.output
    with Image.open(out) as image:
        assert image.size == (2 * base_size, base_size)
        metadata = json.loads(image.text["mixers"])
    assert metadata["prompt"] == "a b c" and metadata["seed"] == 3 and metadata["guidance"] == 3.5
    assert metadata["mixer"] == "linfusion" and metadata["model"] == str(folder)
    assert metadata["stages"][-1]["size"] == [base_size, 2 * base_size]


def test_a_plan_is_a_table(kind: str, folder: Path) -> None:
    base_size = BASE_SIZES[kind]
    process = mixlab("plan", folder=folder, base_size=base_size)
    assert process.exit_code == 0, process.output
    assert f"{2 * base_size} × {base_size}" in process.output and "Denoising takes about" in process.output


def test_too_large_an_image_is_one_sentence(tmp_path: Path) -> None:
    PIPELINES["SD3.5 medium"]().save_pretrained(tmp_path)
    out = tmp_path / "image.png"
    process = mixlab("generate", "a", "--out", str(out), folder=tmp_path, base_size=64)
    assert process.exit_code == 2 and "positions for sides of up to 64 pixels" in process.output
    assert "Traceback" not in process.output and not out.exists()
