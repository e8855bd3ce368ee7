"""Which cells of a run's folder count, and the table of every cell ever measured."""

import copy
import csv
import shutil
from pathlib import Path

import pytest

from experiments.config import DistillationConfig, FitConfig
from experiments.report.collect import append_cells
from experiments.report.run_files import load_run
from tests.experiments.runs import edit, error, make_run


def test_cells_from_before_a_setting_existed_count(tmp_path: Path) -> None:
    """They were trained with what is its default now; another value is another distillation."""
    folder = make_run(tmp_path)
    recorded = DistillationConfig(fit=FitConfig(steps=3, batch_size=2, learning_rate=1e-3)).model_dump(mode="json")

    def name_distillation(grid: dict) -> None:
        for variant in grid["variants"]:
            variant["distillation"] = recorded if variant["name"] == "linear" else variant.get("distillation")

    edit(folder / "grid.json", name_distillation)
    older = copy.deepcopy(recorded)
    del older["fit"]["optimizer"]
    for distillation, count in ((older, 1), ({**older, "images": 7}, 0)):
        edit(folder / "cells/linear-s0-x/config.json", lambda c, d=distillation: c.update(distillation=d))
        assert sum(cell.id == "linear-s0-x" for cell in load_run(folder).cells) == count


def test_cells_of_an_earlier_grid_are_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    edit(folder / "cells/linear-s0-x/config.json", lambda c: c.update(distillation={"steps": 7}))
    run = load_run(folder)
    assert [c.seed for c in run.done("linear")] == [1]
    assert any("its distillation differ" in p for p in run.problems)


def test_cells_of_a_variant_that_changed_under_its_name_are_left_out(tmp_path: Path) -> None:
    """A cell's id is the hash of all its configuration: cells with other ids are no seeds of the same row."""
    folder = make_run(tmp_path)
    ids = [path.name for path in (folder / "cells").iterdir()]
    cells = [{"id": name, "variant": name.split("-s")[0], "seed": int(name.split("-s")[1][0])} for name in ids]
    renamed = [cell | {"id": "linear-s1-y"} if cell["id"] == "linear-s1-x" else cell for cell in cells]
    edit(folder / "grid.json", lambda g: g.update(cells=renamed))
    run = load_run(folder)
    assert [c.seed for c in run.done("linear")] == [0] and ("linear", 1) in run.missing()
    assert any(p.startswith("linear-s1-x: left out") and "no such cell" in p for p in run.problems)
    edit(folder / "grid.json", lambda g: g.update(cells=cells))
    assert {c.id for c in load_run(folder).cells} == set(ids) and not load_run(folder).omitted


def made_with(run: Path, folder: Path, commit: str, cell: str) -> Path:
    """A copy of the run, one cell of which was measured by code of this commit."""
    shutil.copytree(run, folder)
    edit(folder / "cells" / cell / "result.json", lambda r: r["measurements"].update(commit=commit))
    return folder


def test_every_cell_ever_measured_is_in_one_table(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    table = tmp_path / "cells.csv"
    assert append_cells(run, table) == 16
    assert append_cells(run, table) == 0, "a cell is added once"
    with table.open() as file:
        rows = list(csv.DictReader(file))
    row = next(row for row in rows if (row["variant"], row["seed"]) == ("linear", "1"))
    assert float(row["relative_error_to_teacher, 256 × 256 px"]) == error(1.2, 256, 1)
    assert row["protocol"] == "p" and row["steps"] == "100" and row["mixer"] == "linear_attention"
    assert row["commit"] == "", "the commit that a run was last started from may have measured no cell"
    assert append_cells(made_with(run, tmp_path / "fixed", "abc1234", "linear-s1-x"), table) == 1, "after a fix"
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["commit"] for row in rows if (row["variant"], row["seed"]) == ("linear", "1")] == ["", "abc1234"]
    assert {row["commit"] for row in rows if (row["variant"], row["seed"]) != ("linear", "1")} == {""}
    other = make_run(tmp_path / "other")
    edit(other / "grid.json", lambda g: g.update(name="other"))
    for path in other.glob("cells/*/result.json"):
        edit(path, lambda r: r.get("measurements", {}).update(protocol="q"))
    assert append_cells(other, table) == 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n", "it has no column cell"),
        (b"cell,seed,protocol\n1,2\n", "line 2 has another number of columns"),
        (b"cell,seed,protocol\n1,2,3,4\n", "line 2 has another number of columns"),
        (b"\xff\xfe\x00", "Cannot read"),
    ],
)
def test_another_file_is_not_taken_for_the_table_of_cells(content: bytes, message: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    table = tmp_path / "cells.csv"
    table.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        append_cells(run, table)
    assert table.read_bytes() == content
