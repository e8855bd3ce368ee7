"""The study of large images: its count of objects, and its page."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from experiments.ablation.store import write_json
from experiments.highres import reach
from experiments.highres.study import cases
from experiments.highres.study_page import NAMES, count_objects, write_page


@given(
    places=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 2))),
    side=st.sampled_from((64, 300)),
    ring=st.booleans(),
)
def test_things_that_do_not_touch_are_counted(places: set[tuple[int, int]], side: int, ring: bool) -> None:
    picture = Image.new("RGB", (side, side), "teal")
    draw, cell = ImageDraw.Draw(picture), side / 3
    for row, column in places:
        x, y = (column + 0.15) * cell, (row + 0.15) * cell
        box = (x, y, x + 0.7 * cell, y + 0.7 * cell)
        draw.ellipse(box, fill=None if ring else "red", outline="red", width=side // 20)
    draw.point((1, 1), fill="red")  # too small to be a thing
    assert count_objects(picture) == len(places)


@pytest.mark.parametrize("inner", ["red", "teal"])
def test_a_thing_in_a_thing_is_one(inner: str) -> None:
    picture = Image.new("RGB", (64, 64), "teal")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((10, 10, 50, 50), fill="gold")
    draw.rectangle((20, 20, 40, 40), fill=inner)
    assert count_objects(picture) == 1


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
    assert "| progressive | normalised | 0, 0, 0 | 0, 0, 0 | 0 |" in text
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
