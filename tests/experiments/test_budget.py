"""A budget scales every cell alike, once, and the report says so."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.ablation import budget, load_grid
from experiments.ablation.budget import fit_budget, parse_duration, scale_grid
from experiments.ablation.run import select_cells
from experiments.cli import app
from experiments.config import Grid, LossTerm, Variant
from experiments.core.progress import ignore_progress


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1.5h", 5400), ("1d", 86400)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "30 m", "-3m", "0s", "soon", "3m!", "99999999999999999999d"])
def test_invalid_durations_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Expected a time as 90s"):
        parse_duration(text)


def test_every_stage_of_every_row_is_scaled_alike() -> None:
    grid = load_grid("objectives")
    assert scale_grid(grid, 1.0) == grid
    half = scale_grid(grid, 0.5)
    for cell, shorter in zip(grid.cells(), half.cells(), strict=True):
        steps = [stage.fit.steps for stage in cell.distillation.stages]
        assert [stage.fit.steps for stage in shorter.distillation.stages] == [round(n / 2) for n in steps]
        assert shorter.distillation.fit.warmup == round(cell.distillation.fit.warmup / 2)
    assert all(stage.fit.steps == 1 for stage in scale_grid(grid, 0.0).distillation.stages)


def test_objectives_that_start_later_start_at_the_same_share(grid: Grid) -> None:
    objectives = {"noise": LossTerm(), "output": LossTerm(start=3, ramp=2)}
    later = grid.distillation.model_copy(update={"objectives": objectives})
    longer = scale_grid(grid.model_copy(update={"distillation": later}), 10).distillation
    assert longer.fit.steps == 60 and longer.objectives["output"] == LossTerm(start=30, ramp=20)


def test_a_budget_is_measured_once_and_recorded(grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    monkeypatch.setattr(budget, "_measure_cost", lambda cells, *_: measured.append(len(cells)) or (4.0, 1.0))
    broken = Variant(name="broken", label="broken", mixer="linear_attention", options={"nope": 1})
    variants = [v.model_dump() for v in (grid.variants[1], broken)]
    file = tmp_path / "mine.py"
    source = {**grid.model_dump(), "variants": variants}
    file.write_text(f"from experiments.config import Grid\nGRID = Grid.model_validate({source!r})\n", encoding="utf-8")
    out = tmp_path / "run"
    command = ["ablate", str(file), "--out", str(out), "--budget", "10s"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and "failed broken" in done.output, done.output  # the others ran
    description = json.loads((out / "grid.json").read_text())
    factor = description["budget"]["factor"]
    assert factor > 0 and f"scaled the training steps of every cell by {factor:g}." in description["notes"][-1]
    assert description["protocol"]["distillation"]["fit"]["steps"] == max(1, round(6 * factor))
    assert f"by {factor:g}" in (out / "report" / "index.html").read_text()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1 and measured == [2]
    assert json.loads((out / "grid.json").read_text())["cells"] == description["cells"], "the same cells"


def test_a_budget_that_is_too_short_names_what_is_needed(grid: Grid, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"A budget of 0:00:00.0.* is too short for 1 cells.*Expected 0:0\d"):
        fit_budget(grid, select_cells(grid, "linear"), 0.01, 1, tmp_path, ignore_progress)
