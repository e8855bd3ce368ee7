"""`mixlab compare`: the rows that both runs have, seed by seed; runs of two protocols are refused."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import app
from experiments.report.compare import compare_runs, write_comparison
from tests.experiments.runs import SIZES, VARIANTS, edit, make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of one grid; in the second LinFusion's error is half, and one row is new."""
    folder = tmp_path_factory.mktemp("runs")
    first = make_run(folder / "first")
    second = make_run(folder / "second")
    for path in second.glob("cells/linfusion-*/result.json"):
        edit(path, _halve_errors)
    edit(
        second / "grid.json", lambda g: g["variants"].append({**g["variants"][1], "name": "new", "label": "a new one"})
    )
    return first, second


def _halve_errors(result: dict) -> None:
    for row in result["measurements"]["metrics"]["fidelity"]:
        row["relative_error_to_teacher"] /= 2


def test_a_change_is_reported_for_its_row_alone(runs: tuple[Path, Path]) -> None:
    comparison = compare_runs(*runs)
    assert (
        {c.size for c in comparison.changes} == set(SIZES)
        and comparison.unshared == ([], ["a new one"])
        and comparison.names == ("first", "second")
    )
    for change in comparison.changes:
        assert change.ratio.mean == pytest.approx(0.5 if change.label == "LinFusion" else 1.0)
        assert change.significant is (change.label == "LinFusion")
    assert len(comparison.changes) == (len(VARIANTS) - 1) * len(SIZES)


def test_a_run_against_itself_changes_nothing_and_the_reverse_is_the_inverse(runs: tuple[Path, Path]) -> None:
    assert not any(c.significant for c in compare_runs(runs[0], runs[0]).changes)
    there, back = (compare_runs(*pair).changes for pair in (runs, runs[::-1]))
    assert [c.ratio.mean for c in there] == pytest.approx([1 / c.ratio.mean for c in back])


def test_rows_of_one_name_that_are_not_the_same_are_named(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert not compare_runs(*runs).redefined
    other = make_run(tmp_path / "other")
    edit(other / "grid.json", lambda g: next(v for v in g["variants"] if v["name"] == "linear").update(mixer="gla"))
    (sentence,) = compare_runs(runs[0], other).redefined
    assert sentence == (
        "“linear attention” is not the same in both: from the first to the second, "
        'mixer was "linear_attention" and is now "gla".'
    )


def test_the_command(runs: tuple[Path, Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compare", *map(str, runs), "--out", str(tmp_path / "c.md")])
    assert done.exit_code == 0 and "a new one" in done.output, done.output
    assert "3 have a lower error to the teacher in second" in " ".join(done.output.split())
    text = (tmp_path / "c.md").read_text()
    assert (
        "| LinFusion | 256 px |" in text and "▼ 0.500 [0.500, 0.500]" in text and "Only in second: a new one." in text
    )


def test_the_page_is_self_contained_and_other_endings_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    comparison = compare_runs(*runs)
    write_comparison(comparison, tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text()
    assert "<title>second against first</title>" in page and page.count("<tr>") == len(comparison.changes) + 1
    assert not re.search(r"https?:|@import|url\(|fetch\(|import\(", page)
    with pytest.raises(ValueError, match=r"\.html or \.md, got '\.txt'"):
        write_comparison(comparison, tmp_path / "c.txt")


def test_two_protocols_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    first = make_run(tmp_path / "a")
    second = make_run(tmp_path / "b")
    for folder, steps in ((first, 20), (second, 50)):
        (folder / "protocol.json").write_text(json.dumps({"sampler": {"steps": steps}, "hash": str(steps)}))
    done = CliRunner().invoke(app, ["compare", str(first), str(second)])
    assert done.exit_code == 2 and "sampler.steps was 20 and is now 50" in " ".join(done.output.split())
    done = CliRunner().invoke(app, ["compare", str(first), str(tmp_path)])
    assert done.exit_code == 2 and "grid.json" in done.output
