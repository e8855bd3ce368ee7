"""Cells over processes: locks, deaths, two runs of one folder, and what `mixlab status` reports."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from experiments.ablation.cell import open_cell_context, training_key
from experiments.ablation.executors import PROGRESS, RunSettings, attempt_cell, run_in_processes, run_serially
from experiments.ablation.ray_executor import run_on_ray
from experiments.ablation.result import CellResult, read_result, write_result
from experiments.ablation.run import run_grid, select_cells
from experiments.ablation.status import read_status
from experiments.cli import app
from experiments.config import Grid, Variant
from experiments.core.files import write_json
from experiments.core.locks import is_locked, try_lock
from experiments.core.plugins import load_plugin
from experiments.core.progress import ignore_progress
from mixers import entries, list_mixers
from tests.experiments.test_ablation import ignore


def test_a_cell_that_another_run_works_on_or_settled_is_left_alone(grid: Grid, tmp_path: Path) -> None:
    cell = grid.cells()[0]
    settings = RunSettings(tmp_path, since=0.0)
    folder = settings.cell_folder(cell)
    with try_lock(folder):
        assert attempt_cell(cell, settings, ignore_progress) is None
    write_result(folder, CellResult.failure(cell, ValueError("of this run")))
    assert attempt_cell(cell, settings, ignore_progress) is None, "it failed after this run began"
    assert not (folder / "config.json").exists()
    key = training_key(cell, open_cell_context(cell))
    done = CellResult(cell=cell.id, variant="softmax", seed=0, status="done", training_key=key)
    write_result(folder, done)
    assert attempt_cell(cell, RunSettings(tmp_path, since=float("inf")), ignore_progress) is None
    assert read_result(folder) == done
    assert not is_locked(folder)


def test_several_patterns_select_their_union_and_each_must_match(grid: Grid) -> None:
    """Whatever the order of the patterns; a repeated `--only` is one more."""
    names = [cell.variant.name for cell in select_cells(grid, ("soft*", "linear"))]
    assert names == ["softmax", "linear"] == [cell.variant.name for cell in select_cells(grid, ("linear", "soft*"))]
    with pytest.raises(ValueError, match=r"matches 'liner'"):
        select_cells(grid, ("linear", "liner"))


def test_only_some_variants_run_and_status_reports_all(grid: Grid, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"matches 'liner': it has softmax, .*\. Did you mean 'linear'"):
        run_grid(grid, tmp_path, ignore, only="liner")
    broken = Variant(name="linear_bad", label="[broken]", mixer="linear_attention", options={"nope": 1})
    grid = grid.model_copy(update={"variants": (*grid.variants[:2], broken)})
    observed: list[str] = []

    def watch(_done: int, _cells: int, _label: str, phase: str, _step: int, _steps: int) -> None:
        if (tmp_path / "grid.json").exists():
            running = [cell for cell in read_status(tmp_path).cells if cell.state == "running"]
            observed.extend(f"{cell.variant}: {cell.message.split()[0]}" for cell in running)

    results = run_grid(grid, tmp_path, watch, only="linear*", executor=run_serially)
    assert [result.status for result in results] == ["done", "failed"]
    assert results[0].seconds >= results[0].train_seconds > 0
    assert {"linear: load", "linear: distill", "linear: sample"} <= set(observed)
    status = read_status(tmp_path)
    assert [cell.state for cell in status.cells] == ["waiting", "done", "failed"]
    assert status.counts == {"done": 1, "running": 0, "failed": 1, "waiting": 1}
    assert status.seconds_left == pytest.approx(results[0].seconds), "what the only finished cell took"
    printed = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert printed.exit_code == 0, printed.output
    assert "[broken]" in printed.output and "'nope'" in printed.output
    assert "start the same command again for the 1 cells" in printed.output
    assert not list(tmp_path.glob(f"cells/*/{PROGRESS}"))


@pytest.mark.parametrize("grid", [{}, {"cells": [{}]}, {"cells": [{"id": "a"}]}, {"cells": 3}])
def test_the_status_of_another_folder_is_one_sentence(grid: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    done = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert done.exit_code == 2 and "is not the folder of a run" in done.stderr and "Traceback" not in done.output


class Panic(BaseException):
    """As a library in Rust raises it."""

    __module__ = "pyo3_runtime"


def test_a_panic_is_recorded_as_the_cells_error(grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*_: object) -> CellResult:
        raise Panic("index out of bounds")

    monkeypatch.setattr("experiments.ablation.executors.run_cell", panic)
    result = attempt_cell(grid.cells()[0], RunSettings(tmp_path, since=0.0), ignore_progress)
    assert result is not None and result.status == "failed" and "index out of bounds" in str(result.error)


def test_a_folder_holds_one_grid(grid: Grid, tmp_path: Path) -> None:
    write_json(tmp_path / "grid.json", {"name": "another"})
    with pytest.raises(ValueError, match=f"a run of the grid another, not of {grid.name}"):
        run_grid(grid, tmp_path, ignore)


MORTAL = """
import os, signal, sys
from pathlib import Path
import torch
from mixers import register_mixer
from mixers.zoo.linear_attention import LinearAttention


class Mortal(LinearAttention):
    after, calls = 9, 0

    def mix(self, streams):
        type(self).calls += torch.is_grad_enabled()
        if ray := sys.modules.get("ray"):
            node = ray.get_runtime_context().get_node_id()
            Path(__file__).with_name(f"node-{node}").touch()
        if type(self).calls > self.after and self.dies():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().mix(streams)


@register_mixer("dies_once")
class Once(Mortal):
    def dies(self):
        mark = Path(__file__).with_name("dead")
        first = not mark.exists()
        mark.touch()
        return first


@register_mixer("dies_never")
class Never(Mortal):
    def dies(self):
        return False


@register_mixer("dies_always")
class Always(Mortal):
    after = 0

    def dies(self):
        return True
"""


@pytest.fixture
def mortal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plug-in of mixers that kill their process in training, registered for one test."""
    list_mixers()
    monkeypatch.setattr(entries, "ENTRIES", dict(entries.ENTRIES))
    plugin = tmp_path / "mortal.py"
    plugin.write_text(MORTAL, encoding="utf-8")
    load_plugin(plugin)
    return plugin


@pytest.mark.slow  # five processes start
def test_a_worker_that_dies_loses_minutes_and_no_result(grid: Grid, tmp_path: Path, mortal: Path) -> None:
    deadly = _deadly(grid, "dies_once", "dies_always", "linear_attention")
    executor = partial(run_in_processes, count=2)
    results = run_grid(deadly, tmp_path / "run", ignore, executor=executor, plugins=[mortal])
    _check_deaths(tmp_path, results, "its process died 2 times, the last time by SIGKILL")


@pytest.mark.slow  # a cluster starts, and its processes
def test_a_cluster_of_two_nodes_runs_the_cells_and_survives_a_cell_that_dies(
    grid: Grid, tmp_path: Path, mortal: Path
) -> None:
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="the extra `ray` is not installed")
    deadly = _deadly(grid, "dies_always", "dies_never")
    cluster = cluster_utils.Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=80_000_000, include_dashboard=False)
        executor = partial(run_on_ray, address=cluster.address)
        results = run_grid(deadly, tmp_path / "run", ignore, executor=executor, plugins=[mortal])
    finally:
        cluster.shutdown()
    died, lived = sorted(results, key=lambda result: result.variant)
    assert lived.status == "done" and died.status == "failed"
    assert "its process or node died 2 times" in str(died.error)
    assert len(list(tmp_path.glob("node-*"))) == 2, "both nodes had cells"


def test_a_missing_cluster_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    with pytest.raises(ValueError, match="No Ray cluster at 'nowhere:1'"):
        list(run_on_ray([], RunSettings(tmp_path, 0.0), ignore_progress, "nowhere:1"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'linear-token-mixers\[ray\]'"):
        list(run_on_ray([], RunSettings(tmp_path, 0.0), ignore_progress, "auto"))


def _deadly(grid: Grid, *mixers: str) -> Grid:
    return grid.model_copy(update={"variants": tuple(Variant(name=name, label=name, mixer=name) for name in mixers)})


def _check_deaths(tmp_path: Path, results: list[CellResult], message: str) -> None:
    """One cell died once and resumed, one died twice, and the third was not affected."""
    by_variant = {result.variant: result for result in results}
    states = {name: result.status for name, result in by_variant.items()}
    assert states == {"dies_once": "done", "dies_always": "failed", "linear_attention": "done"}, by_variant
    assert message in str(by_variant["dies_always"].error)
    assert (tmp_path / "dead").exists()
    folders = [tmp_path / "run" / "cells" / by_variant[name].cell for name in ("dies_once", "linear_attention")]
    for folder in folders:
        assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [2, 4, 6]
    died, lived = (load_file(folder / "adapter" / "adapter.safetensors") for folder in folders)
    assert died.keys() == lived.keys() and len(died) > 0
    assert all(died[name].equal(lived[name]) for name in died)
    assert read_status(tmp_path / "run").counts["failed"] == 1
