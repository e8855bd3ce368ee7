"""Bad input at the command line is one sentence: odd settings, names and seeds, and files that are something else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from accelerate import Accelerator
from typer.testing import CliRunner

from experiments.bench import calibrate
from experiments.cli import app
from experiments.core.files import read_json, write_json
from experiments.report.run_files import load_cell, load_run
from experiments.training.log import MetricsLog
from tests.experiments.runs import make_run

NESTED = "[" * 100_000

GRID = """
from experiments.config import DistillationConfig, EvaluationConfig, FitConfig, Grid, Variant
GRID = Grid(
    name="tiny",
    question="?",
    variants=(Variant(name="softmax", label="softmax", mixer="softmax", trained=False),),
    distillation=DistillationConfig(fit=FitConfig(steps=1, batch_size=2, learning_rate=1e-3), images=2),
    evaluation=EvaluationConfig(),
)
"""


def fails(*words: str) -> str:
    """Run a command that has to fail with one sentence; returns it."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output and result.stderr.count("error:") == 1, result.output
    return " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (f"variants.0.options={NESTED}", "variants.0.options: Input should be a valid dictionary"),
        (f"distillation.image_size={'9' * 5000}", "distillation.image_size: "),
        ("distillation.image_size=1000000000", "less than or equal to 32768"),
        ("evaluation.sizes=[1000000000]", "less than or equal to 32768"),
        ("distillation.fit.learning_rate=Infinity", "learning_rate: Input should be a finite number"),
        ("seeds=[1,1]", "seeds need to be different, got 1, 1"),
        ("name=../elsewhere", "name: String should match pattern"),
    ],
    ids=["nested", "digits", "size", "sizes", "infinite", "seeds", "name"],
)
def test_a_setting_of_a_grid(setting: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "grid.py").write_text(GRID)
    assert message in fails("ablate", str(tmp_path / "grid.py"), "--out", str(tmp_path / "run"), "--set", setting)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", ["import sys; sys.exit(3)", "raise SystemExit"])
def test_a_grid_that_exits(source: str, tmp_path: Path) -> None:
    (tmp_path / "grid.py").write_text(source)
    assert "Cannot load the grid" in fails("ablate", str(tmp_path / "grid.py"))


@pytest.mark.parametrize("content", [NESTED, "date: 2024-13-99", "\x00"])
def test_a_recipe_that_is_no_yaml(content: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    assert f"Cannot read the recipe {tmp_path / 'mine.yaml'}" in fails("distill", str(tmp_path / "mine.yaml"))


def test_files_that_are_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / "grid.json").write_text(NESTED)
    assert read_json(tmp_path / "grid.json") == {}
    assert "is not a readable grid" in fails("report", str(tmp_path))


@pytest.mark.parametrize("line", ["null", "3", "[]", '"step"', '{"loss": 1}', '{"step": null}', NESTED])
def test_a_log_with_lines_that_are_no_records(line: str, tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text(line + "\n")
    assert "metrics.jsonl: 1 damaged line skipped" in load_cell(tmp_path).problems
    log.write_bytes(b'{"step": 1, "loss": 2.0}\n\xff\xfe\n' + line.encode() + b'\n{"step": 2, "loss": 1.0}\n')
    records = MetricsLog(tmp_path, cast(Accelerator, SimpleNamespace(is_main_process=True))).truncate(2)
    assert records == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


@pytest.mark.parametrize("content", ["null", "3", NESTED, '{"hash": ', "\x00"])
def test_protocols_that_are_no_objects_cannot_be_compared(content: str, tmp_path: Path) -> None:
    first = tmp_path / "first"
    second = tmp_path / "second"
    for run in (first, second):
        write_json(run / "grid.json", {"name": "run", "variants": []})
    (second / "protocol.json").write_text(content)
    assert f"Cannot read the protocol {second / 'protocol.json'}" in fails("compare", str(first), str(second))


@pytest.mark.parametrize("content", [NESTED, "null", '{"format": 1, "devices": [3]}'])
def test_a_damaged_table_of_backends_is_found_before_the_work(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "time_backends", lambda *_: pytest.fail("measured"))
    table = tmp_path / "table.json"
    table.write_text(content)
    assert "cannot be read" in fails("bench", "--calibrate", "--quick", "--table", str(table))


def test_a_table_of_backends_that_cannot_be_written_is_found_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "time_backends", lambda *_: pytest.fail("measured"))
    assert "No such file" in fails("bench", "--calibrate", "--quick", "--table", "/proc/no/table.json")


@pytest.mark.parametrize(
    "words",
    [
        ("crossover", "identity", "--dim", "1000000000000", "--heads", "1", "--max-tokens", "128"),
        ("bench", "--calibrate", "--quick", "--batch", "1000000000000", "--table", "table.json"),
    ],
    ids=["crossover", "calibrate"],
)
def test_tensors_that_fit_no_memory(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Out of memory" in fails(*words)


def test_a_log_with_a_step_that_is_no_number_is_reported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log = next(run.glob("cells/linear-s0-x/metrics.jsonl"))
    log.write_text(log.read_text() + json.dumps({"step": float("inf"), "loss": 1}) + "\n" + NESTED + "\n")
    cell = next(cell for cell in load_run(run).cells if cell.id == "linear-s0-x")
    assert "metrics.jsonl: 2 damaged lines skipped" in cell.problems
