"""The study of large images: its count of areas, its page, and what is timed."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from experiments.core.files import write_json
from experiments.highres import reach
from experiments.studies.large_images.page import NAMES, count_areas, write_page
from experiments.studies.large_images.study import cases


@given(
    places=st.dictionaries(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(("red", "gold", "ring"))),
    times=st.sampled_from((1, 3)),
    soft=st.sampled_from((0.0, 0.7)),
)
def test_areas_are_counted_at_any_size_however_soft_their_edges(
    places: dict[tuple[int, int], str], times: int, soft: float
) -> None:
    picture = Image.new("RGB", (128 * times, 128 * times), "teal")
    draw = ImageDraw.Draw(picture)

    def square(row: int, column: int, inset: int, color: str) -> None:
        top, left = (times * (32 * place + inset) for place in (row, column))
        draw.rectangle((left, top, left + times * (32 - 2 * inset) - 1, top + times * (32 - 2 * inset) - 1), color)

    for (row, column), color in places.items():
        square(row, column, 4, "red" if color == "ring" else color)
        if color == "ring":
            square(row, column, 12, "teal")
    draw.point((0, 0), "red")  # too small to be an area
    picture = picture.filter(ImageFilter.GaussianBlur(times * soft))
    assert count_areas(picture) == 1 + sum(2 if color == "ring" else 1 for color in places.values())


def test_the_page_holds_what_was_made(tmp_path: Path) -> None:
    made = cases("a", "b", 1024)
    for case in made:
        folder = tmp_path / "runs" / case.folder
        folder.mkdir(parents=True)
        first = case.size if case.mode == "direct" else 256
        sides = [first * 2**n for n in range(3) if first * 2**n <= case.size]
        rows = [
            {"side": side, "steps": 2, "seconds": 1e-6 * side**2, "bytes": side**2, "foreseen": 1.0} for side in sides
        ]
        for side in sides:
            Image.new("RGB", (side // 8, side // 8), "teal").save(folder / f"{side}.png")
        told = {"name": case.name, "mode": case.mode, "size": case.size, "prompt": case.prompt, "seed": case.seed}
        write_json(folder / "record.json", {**told, "stages": rows})
    write_page(tmp_path / "runs", tmp_path / "page" / "large.md")
    text = (tmp_path / "page" / "large.md").read_text()
    for mode, name in product(("direct", "progressive"), NAMES):
        assert f"| {mode} | {name} |" in text
    assert "| progressive | normalized | 1, 1, 1 | 1, 1, 1 | 1 |" in text
    assert "| 1024 px | 65,536 | 2 | 1.0 | 1.0 | 1 |" in text
    for figure in ("stages", "direct_or_progressive", "cost"):
        assert (tmp_path / "page" / f"{figure}.png").stat().st_size > 1000


def test_what_an_image_takes_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "new" / "reach.jsonl"
    asked = ["reach", str(results), "--model", "embedded", "--device", "cpu", "--dtype", "float32", "--steps", "2"]
    for more in (["--size", "128x64"], ["--size", "128x64", "--memory", "1MB"]):
        monkeypatch.setattr("sys.argv", [*asked, *more])
        reach.main()
    done, refused = map(json.loads, results.read_text().splitlines())
    assert done["parts"].keys() == {"64 × 32", "128 × 64", "pixels"}
    assert done["seconds"] >= sum(part["seconds"] for part in done["parts"].values()) > 0
    assert "does not fit in 1.00 MiB" in refused["error"]
    monkeypatch.setattr("sys.argv", ["reach", str(results), "--show"])
    capsys.readouterr()
    reach.main()
    assert capsys.readouterr().out.count("128x64") == 2
