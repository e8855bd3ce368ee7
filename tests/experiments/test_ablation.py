"""The whole road on a tiny teacher: cells, records, resuming, failing, the command line."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from experiments.ablation import load_grid, run_grid
from experiments.ablation.grid import list_grids
from experiments.cli import app
from experiments.config import Grid, apply_overrides
from mixers import list_mixers


def quiet(*_: object) -> None:
    """No progress display."""


def results(directory: Path) -> dict[str, dict]:
    records = [json.loads(p.read_text()) for p in directory.glob("cells/*/result.json")]
    return {r["variant"]: r for r in records}


class Killed(BaseException):
    """Stands for the end of the process."""


def test_the_road(grid: Grid, tmp_path: Path) -> None:
    run_grid(grid, tmp_path, quiet)
    found = results(tmp_path)
    assert set(found) == {"softmax", "linear", "linear_raw"}
    for name, record in found.items():
        assert record["status"] == "done", record["error"]
        assert [row["size"] for row in record["fidelity"]] == [64, 128]
        assert [row["tokens"] for row in record["speed"]] == [256, 1024]
        cell = tmp_path / "cells" / record["cell"]
        assert (cell / "samples" / "64" / "0.png").is_file()
        matrix = load_file(cell / "arrays.safetensors")["mixing_matrix"]
        assert matrix.shape == (256, 256)
        errors = [row["error_to_teacher"] for row in record["fidelity"]]
        if name == "softmax":
            assert errors == [0.0, 0.0], "the sanity row"
        else:
            assert min(errors) > 0
    assert (tmp_path / "teacher" / "samples" / "64" / "0.png").is_file()
    assert run_grid(grid, tmp_path, quiet) == [], "nothing is done twice"


def test_killed_and_started_again_is_bit_identical(grid: Grid, tmp_path: Path) -> None:
    only = grid.model_copy(update={"variants": grid.variants[1:2]})
    run_grid(only, tmp_path / "whole", quiet)

    def kill(_cells: int, _total: int, _label: str, phase: str, done: int, _steps: int) -> None:
        if phase == "distill" and done == 5:
            raise Killed

    with pytest.raises(Killed):
        run_grid(only, tmp_path / "killed", kill)
    assert not results(tmp_path / "killed")
    run_grid(only, tmp_path / "killed", quiet)
    cell = only.cells()[0].id
    whole, resumed = (
        load_file(tmp_path / run / "cells" / cell / "adapter" / "adapter.safetensors") for run in ("whole", "killed")
    )
    assert whole.keys() == resumed.keys()
    assert all(whole[k].equal(resumed[k]) for k in whole)


def test_a_failing_cell_is_recorded_and_the_others_go_on(grid: Grid, tmp_path: Path) -> None:
    broken = grid.variants[1].model_copy(update={"name": "broken", "options": {"no_such_option": 1}})
    records = run_grid(grid.model_copy(update={"variants": (broken, grid.variants[0])}), tmp_path, quiet)
    assert [r["status"] for r in records] == ["failed", "done"]
    assert "no_such_option" in records[0]["error"]


def test_cell_ids_follow_the_configuration(grid: Grid) -> None:
    ids = [cell.id for cell in grid.cells()]
    assert len(set(ids)) == 3
    assert ids == [cell.id for cell in grid.cells()]
    changed = apply_overrides(grid, ["distillation.fit.steps=7", "seeds=[0,1]"])
    assert len(changed.cells()) == 6
    assert not set(ids) & {cell.id for cell in changed.cells()}


@pytest.mark.parametrize("setting", ["nonsense", "nothing.there=1", "distillation.fit.steps=-1", "seeds=[]"])
def test_bad_settings_are_refused(grid: Grid, setting: str) -> None:
    with pytest.raises(ValueError):
        apply_overrides(grid, [setting])


@pytest.mark.parametrize("name", list_grids())
def test_ready_made_grids_load_and_name_known_mixers(name: str) -> None:
    grid = load_grid(name)
    assert {v.mixer for v in grid.variants} <= set(list_mixers())


def test_grids_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'demo'"):
        load_grid("demoo")
    (tmp_path / "empty.py").write_text("GRID = 3\n")
    with pytest.raises(ValueError, match="does not expose"):
        load_grid(str(tmp_path / "empty.py"))


def test_command_line(grid: Grid, tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert "linfusion" in run(app, ["list"]).output
    file = tmp_path / "mine.py"
    file.write_text(f"from experiments.config import Grid\nGRID = Grid.model_validate({grid.model_dump()!r})\n")
    done = run(app, ["ablate", str(file), "--out", str(tmp_path / "run"), "--set", "distillation.fit.steps=2"])
    assert done.exit_code == 0, done.output
    page = tmp_path / "run" / "report" / "index.html"
    assert page.is_file()
    page.unlink()
    assert run(app, ["report", str(tmp_path / "run")]).exit_code == 0
    assert page.is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["ablate", "nothing"],
        ["report", "no/such/run"],
        ["ablate", "demo", "--set", "x"],
        ["ablate", "demo", "--teacher", "no/model"],
    ],
)
def test_bad_input_never_gives_a_traceback(arguments: list[str], tmp_path: Path) -> None:
    outcome = CliRunner().invoke(
        app, [*arguments, *(["--out", str(tmp_path / "out")] if arguments[0] == "ablate" else [])]
    )
    assert outcome.exit_code == 2
    assert "error" in outcome.output
    assert "Traceback" not in outcome.output


def test_what_is_trained_is_evaluated_anew_without_training_again(grid: Grid, tmp_path: Path) -> None:
    only = grid.model_copy(update={"variants": grid.variants[1:2]})
    first = run_grid(only, tmp_path, quiet)[0]
    phases: list[str] = []
    again = apply_overrides(only, ["evaluation.sizes=[64]"])
    second = run_grid(again, tmp_path, lambda *event: phases.append(event[3]))[0]
    assert "sample" in phases and "distill" not in phases
    assert second["cell"] != first["cell"]
    for same in ("steps", "trained_parameters", "train_seconds"):
        assert second[same] == first[same] > 0
    assert second["fidelity"][0]["error_to_teacher"] == first["fidelity"][0]["error_to_teacher"]
    logs = [(tmp_path / "cells" / record["cell"] / "metrics.jsonl").read_text() for record in (first, second)]
    assert logs[0] == logs[1] != ""
    assert (
        run_grid(apply_overrides(again, ["seeds=[1]"]), tmp_path, quiet)[0]["train_seconds"] != first["train_seconds"]
    )


def test_a_training_is_known_by_all_that_its_weights_depend_on(grid: Grid) -> None:
    def trainings(*settings: str) -> set[str]:
        return {cell.training for cell in apply_overrides(grid, list(settings)).cells()}

    assert len(trainings()) == 3
    assert trainings("evaluation.images=3", "variants.1.name=other", "variants.1.label=other") == trainings()
    for setting in ("seeds=[1]", "distillation.fit.steps=7", "distillation.images=9", "data=folder"):
        assert not trainings(setting) & trainings()
    assert len(trainings("variants.1.min_tokens=64") & trainings()) == 2
