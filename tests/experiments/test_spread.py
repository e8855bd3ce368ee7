"""Cells over processes: claims, deaths, two runs of one folder, and what `mixlab status` sees of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from experiments.ablation import in_processes, read_status, run_grid, store
from experiments.ablation.on_ray import on_ray
from experiments.ablation.spread import Record, Work, attempt, in_turn, threads
from experiments.cli import app
from experiments.config import Grid, Variant
from experiments.core.files import write_json
from experiments.core.locks import LOCK, is_locked, try_lock
from experiments.core.plugins import load_plugin
from mixers import entries, list_mixers
from tests.experiments.test_ablation import quiet


def test_a_claim_holds_while_it_is_held_and_ends_with_its_process(tmp_path: Path) -> None:
    with try_lock(tmp_path) as ours:
        assert ours and is_locked(tmp_path)
        with try_lock(tmp_path) as twice:
            assert not twice
        assert is_locked(tmp_path), "a refused claim takes nothing away"
    assert not is_locked(tmp_path)
    code = (
        "import filelock as f, sys; lock = f.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / LOCK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdin is not None
    assert holder.stdout.readline() == b"held\n"
    assert is_locked(tmp_path)
    with try_lock(tmp_path) as ours:
        assert not ours
    holder.kill()
    holder.communicate()
    with try_lock(tmp_path) as ours:
        assert ours, "the claim of a dead process is nobody's"


def test_a_cell_that_another_run_has_or_had_is_left_alone(grid: Grid, tmp_path: Path) -> None:
    cell, work = grid.cells()[0], Work(tmp_path, since=0.0)
    with try_lock(work.folder(cell)):
        assert attempt(cell, work, lambda *_: None) is None
    write_json(work.folder(cell) / store.RESULT, store.failure(cell.id, "softmax", 0, ValueError("of now")))
    assert attempt(cell, work, lambda *_: None) is None, "it failed after this run began"
    assert not (work.folder(cell) / "config.json").exists()
    write_json(work.folder(cell) / store.RESULT, {"status": "done"})
    assert attempt(cell, Work(tmp_path, since=float("inf")), lambda *_: None) is None


def test_only_some_variants_run_and_status_tells_of_all(grid: Grid, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"matches 'liner': it has softmax, .*\. Did you mean 'linear'"):
        run_grid(grid, tmp_path, quiet, only="liner")
    broken = Variant(name="linear_bad", label="[broken]", mixer="linear_attention", options={"nope": 1})
    grid = grid.model_copy(update={"variants": (*grid.variants[:2], broken)})
    seen: list[str] = []

    def watch(_done: int, _cells: int, _label: str, phase: str, _step: int, _steps: int) -> None:
        if (tmp_path / "grid.json").exists():
            running = [cell for cell in read_status(tmp_path).cells if cell.state == "running"]
            seen.extend(f"{cell.variant}: {cell.told.split()[0]}" for cell in running)

    records = run_grid(grid, tmp_path, watch, only="linear*", spread=in_turn)
    assert [r["status"] for r in records] == ["done", "failed"]
    assert records[0]["seconds"] >= records[0]["train_seconds"] > 0
    assert {"linear: load", "linear: distill", "linear: sample"} <= set(seen)
    status = read_status(tmp_path)
    assert [cell.state for cell in status.cells] == ["waiting", "done", "failed"]
    assert status.counts == {"done": 1, "running": 0, "failed": 1, "waiting": 1}
    assert status.left == pytest.approx(records[0]["seconds"]), "what the only finished cell took"
    told = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert told.exit_code == 0, told.output
    assert "[broken]" in told.output and "has no option 'nope'" in told.output
    assert "start the same command again for the 1 cells" in told.output
    assert not list(tmp_path.glob(f"cells/*/{store.PROGRESS}"))


@pytest.mark.parametrize("grid", [{}, {"cells": [{}]}, {"cells": [{"id": "a"}]}, {"cells": 3}])
def test_status_of_no_run_is_one_sentence(grid: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    done = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert done.exit_code == 2 and "is no run's folder" in done.output and "Traceback" not in done.output


class Panic(BaseException):
    """As a library in Rust raises it."""

    __module__ = "pyo3_runtime"


def test_a_panic_is_its_cell_s_error_alone(grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*_: object) -> dict[str, object]:
        raise Panic("index out of bounds")

    monkeypatch.setattr("experiments.ablation.spread.run_cell", panic)
    cell, work = grid.cells()[0], Work(tmp_path, since=0.0)
    record = attempt(cell, work, lambda *_: None)
    assert record is not None and record["status"] == "failed" and "index out of bounds" in record["error"]


def test_a_folder_holds_one_grid(grid: Grid, tmp_path: Path) -> None:
    write_json(tmp_path / "grid.json", {"name": "another"})
    with pytest.raises(ValueError, match=f"a run of the grid another, not of {grid.name}"):
        run_grid(grid, tmp_path, quiet)


def test_cores_are_shared_out() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert threads(1) == cores and threads(10_000) == 1


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


@pytest.mark.slow  # five processes begin
def test_a_worker_that_dies_loses_minutes_and_no_result(grid: Grid, tmp_path: Path, mortal: Path) -> None:
    deadly = _deadly(grid, "dies_once", "dies_always", "linear_attention")
    records = run_grid(deadly, tmp_path / "run", quiet, spread=partial(in_processes, count=2), plugins=[mortal])
    _check_deaths(tmp_path, records, "its process died 2 times, the last time by SIGKILL")


@pytest.mark.slow  # a cluster begins, and its processes
def test_a_cluster_of_two_nodes_does_the_cells_and_outlives_a_cell_that_dies(
    grid: Grid, tmp_path: Path, mortal: Path
) -> None:
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="the extra `ray` is not installed")
    deadly = _deadly(grid, "dies_always", "dies_never")
    cluster = cluster_utils.Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=80_000_000, include_dashboard=False)
        spread = partial(on_ray, address=cluster.address)
        records = run_grid(deadly, tmp_path / "run", quiet, spread=spread, plugins=[mortal])
    finally:
        cluster.shutdown()
    died, lived = sorted(records, key=lambda record: str(record["variant"]))
    assert lived["status"] == "done" and died["status"] == "failed"
    assert "its process or node died 2 times" in died["error"]
    assert len(list(tmp_path.glob("node-*"))) == 2, "both nodes had cells"


def test_no_cluster_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    with pytest.raises(ValueError, match="No Ray cluster at 'nowhere:1'"):
        list(on_ray([], Work(tmp_path, 0.0), lambda *_: None, "nowhere:1"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'linear-token-mixers\[ray\]'"):
        list(on_ray([], Work(tmp_path, 0.0), lambda *_: None, "auto"))


def _deadly(grid: Grid, *mixers: str) -> Grid:
    return grid.model_copy(update={"variants": tuple(Variant(name=name, label=name, mixer=name) for name in mixers)})


def _check_deaths(tmp_path: Path, records: list[Record], told: str) -> None:
    """One cell died once and went on as if nothing had happened, one died twice, and the third did not care."""
    found = {record["variant"]: record for record in records}
    states = {name: record["status"] for name, record in found.items()}
    assert states == {"dies_once": "done", "dies_always": "failed", "linear_attention": "done"}, found
    assert told in found["dies_always"]["error"]
    assert (tmp_path / "dead").exists()
    folders = [tmp_path / "run" / "cells" / found[name]["cell"] for name in ("dies_once", "linear_attention")]
    for folder in folders:
        assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [2, 4, 6]
    died, lived = (load_file(folder / "adapter" / "adapter.safetensors") for folder in folders)
    assert died.keys() == lived.keys() and len(died) > 0
    assert all(died[name].equal(lived[name]) for name in died)
    assert read_status(tmp_path / "run").counts["failed"] == 1
