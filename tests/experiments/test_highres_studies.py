"""The studies of large images: the count of areas, the page, and what is measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from experiments.core.files import write_json
from experiments.studies.large_images.areas import count_areas
from experiments.studies.large_images.figures import NAMES
from experiments.studies.large_images.page import write_page
from experiments.studies.large_images.study import RECORD, list_cases
from experiments.studies.largest_image import gpu_session
from experiments.studies.largest_image import study as largest_image


@given(
    shapes=st.dictionaries(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(("red", "gold", "ring"))),
    scale=st.sampled_from((1, 3)),
    blur=st.sampled_from((0.0, 0.7)),
)
def test_areas_are_counted_at_any_size_and_sharpness(
    shapes: dict[tuple[int, int], str], scale: int, blur: float
) -> None:
    image = Image.new("RGB", (128 * scale, 128 * scale), "teal")
    draw = ImageDraw.Draw(image)

    def square(row: int, column: int, inset: int, color: str) -> None:
        top, left = (scale * (32 * index + inset) for index in (row, column))
        side = scale * (32 - 2 * inset)
        draw.rectangle((left, top, left + side - 1, top + side - 1), color)

    for (row, column), color in shapes.items():
        square(row, column, 4, "red" if color == "ring" else color)
        if color == "ring":
            square(row, column, 12, "teal")
    draw.point((0, 0), "red")  # too small to be an area
    image = image.filter(ImageFilter.GaussianBlur(scale * blur))
    assert count_areas(image) == 1 + sum(2 if color == "ring" else 1 for color in shapes.values())


def test_the_page_contains_every_image(tmp_path: Path) -> None:
    for case in list_cases("a", "b", 1024):
        folder = tmp_path / "runs" / case.folder
        folder.mkdir(parents=True)
        first = case.size if case.mode == "direct" else 256
        sides = [first * 2**n for n in range(3) if first * 2**n <= case.size]
        stages = [
            {"side": side, "steps": 2, "seconds": 1e-6 * side**2, "bytes": side**2, "estimated_seconds": 1.0}
            for side in sides
        ]
        for side in sides:
            Image.new("RGB", (side // 8, side // 8), "teal").save(folder / f"{side}.png")
        record = {"name": case.name, "mode": case.mode, "size": case.size, "prompt": case.prompt, "seed": case.seed}
        write_json(folder / "record.json", {**record, "stages": stages})
    write_page(tmp_path / "runs", tmp_path / "page" / "large.md")
    text = (tmp_path / "page" / "large.md").read_text()
    for mode, name in product(("direct", "progressive"), NAMES):
        assert f"| {mode} | {name} |" in text
    assert "| progressive | normalized | 1, 1, 1 | 1, 1, 1 | 1 |" in text
    assert "| 1024 px | 65,536 | 2 | 1.0 | 1.0 | 1 |" in text
    for figure in ("stages", "direct_or_progressive", "cost"):
        assert (tmp_path / "page" / f"{figure}.png").stat().st_size > 1000


def test_an_image_of_another_adapter_is_made_again(tmp_path: Path) -> None:
    adapters = []
    for name in ("first", "second"):
        adapters.append(tmp_path / name)
        adapters[-1].mkdir()
        (adapters[-1] / "adapter.safetensors").write_text(name)
    first, second = (list_cases(str(adapter), "raw", 1024)[3] for adapter in adapters)
    assert first.folder == second.folder and first.adapter == str(adapters[0])
    folder = tmp_path / "image"
    folder.mkdir()
    assert not first.is_complete(folder)
    write_json(folder / RECORD, {**asdict(first), **first.provenance(), "stages": []})
    assert first.is_complete(folder) and not second.is_complete(folder)
    (adapters[0] / "adapter.safetensors").write_text("trained again")
    assert not first.is_complete(folder)


def test_the_largest_image_study_appends_a_line_per_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "new" / "results.jsonl"
    command = ["study", str(results), "--model", "embedded", "--device", "cpu", "--dtype", "float32", "--steps", "2"]
    for options in (["--size", "128x64"], ["--size", "128x64", "--memory", "1MB"]):
        monkeypatch.setattr("sys.argv", [*command, *options])
        largest_image.main()
    completed, refused = map(json.loads, results.read_text().splitlines())
    assert completed["parts"].keys() == {"64 × 32", "128 × 64", "pixels"}
    assert completed["seconds"] >= sum(part["seconds"] for part in completed["parts"].values()) > 0
    assert "does not fit in 1.00 MiB" in refused["error"]
    monkeypatch.setattr("sys.argv", ["study", str(results), "--print"])
    capsys.readouterr()
    largest_image.main()
    assert capsys.readouterr().out.count("128x64") == 2


def test_a_dry_run_of_the_gpu_session_executes_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every different command: on the CPU, steps that differ in the model or the size are the same small image."""
    first = {step.dry_arguments: step for step in reversed(gpu_session.STEPS)}
    steps = tuple(step for step in gpu_session.STEPS if first[step.dry_arguments] is step)
    monkeypatch.setattr(gpu_session, "STEPS", steps)
    assert gpu_session.main([str(tmp_path), "--dry-run", "--budget", "600"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == len(steps) - 1 >= 3 and not [row for row in rows if "error" in row]
    outcomes = json.loads((tmp_path / "steps.json").read_text())
    assert {outcome["status"] for outcome in outcomes} == {"succeeded"}
