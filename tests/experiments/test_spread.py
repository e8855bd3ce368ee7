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
from experiments.ablation.spread import Work, attempt, in_turn, threads
from experiments.cli import app
from experiments.config import Grid, Variant
from mixers import registry
from mixers.registry import load_plugin
from tests.experiments.test_ablation import quiet


def test_a_claim_holds_while_it_is_held_and_ends_with_its_process(tmp_path: Path) -> None:
    with store.claim(tmp_path) as ours:
        assert ours and store.claimed(tmp_path)
        with store.claim(tmp_path) as twice:
            assert not twice
        assert store.claimed(tmp_path), "a refused claim takes nothing away"
    assert not store.claimed(tmp_path)
    code = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / store.LOCK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdin is not None
    assert holder.stdout.readline() == b"held\n"
    assert store.claimed(tmp_path)
    with store.claim(tmp_path) as ours:
        assert not ours
    holder.kill()
    holder.communicate()
    with store.claim(tmp_path) as ours:
        assert ours, "the claim of a dead process is nobody's"


def test_a_cell_that_another_run_has_or_had_is_left_alone(grid: Grid, tmp_path: Path) -> None:
    cell, work = grid.cells()[0], Work(tmp_path, since=0.0)
    with store.claim(work.folder(cell)):
        assert attempt(cell, work, lambda *_: None) is None
    store.write_json(work.folder(cell) / store.RESULT, store.failure(cell.id, "softmax", 0, ValueError("of now")))
    assert attempt(cell, work, lambda *_: None) is None, "it failed after this run began"
    assert not (work.folder(cell) / "config.json").exists()
    store.write_json(work.folder(cell) / store.RESULT, {"status": "done"})
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
    assert {"linear: load", "linear: distil", "linear: sample"} <= set(seen)
    status = read_status(tmp_path)
    assert [cell.state for cell in status.cells] == ["waiting", "done", "failed"]
    assert status.counts == {"done": 1, "running": 0, "failed": 1, "waiting": 1}
    assert status.left == pytest.approx(records[0]["seconds"]), "what the only finished cell took"
    told = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert told.exit_code == 0, told.output
    assert "[broken]" in told.output and "has no option 'nope'" in told.output
    assert "start the same command again for the 1 cells" in told.output
    assert not list(tmp_path.glob(f"cells/*/{store.PROGRESS}"))


def test_status_of_no_run_is_one_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert done.exit_code == 2 and "is no run's folder" in done.output and "Traceback" not in done.output


def test_cores_are_shared_out() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert threads(1) == cores and threads(10_000) == 1


MORTAL = """
import os, signal
from pathlib import Path
import torch
from mixers import register_mixer
from mixers.zoo.linear_attention import LinearAttention


class Mortal(LinearAttention):
    after, calls = 9, 0

    def mix(self, streams):
        type(self).calls += torch.is_grad_enabled()
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


@register_mixer("dies_always")
class Always(Mortal):
    after = 0

    def dies(self):
        return True
"""


@pytest.mark.slow  # five processes begin
def test_a_worker_that_dies_loses_minutes_and_no_result(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    plugin = tmp_path / "mortal.py"
    plugin.write_text(MORTAL, encoding="utf-8")
    load_plugin(plugin)
    names = ("dies_once", "dies_always", "linear_attention")
    variants = tuple(Variant(name=name, label=name, mixer=name) for name in names)
    deadly = grid.model_copy(update={"variants": variants})
    records = {
        record["variant"]: record
        for record in run_grid(deadly, tmp_path / "run", quiet, spread=partial(in_processes, count=2), plugins=[plugin])
    }
    assert {name: record["status"] for name, record in records.items()} == {
        "dies_once": "done",
        "dies_always": "failed",
        "linear_attention": "done",
    }
    assert "died 2 times, the last time by SIGKILL" in records["dies_always"]["error"]
    assert (tmp_path / "dead").exists()
    steps = [json.loads(line)["step"] for line in _log(tmp_path, records["dies_once"])]
    assert steps == [2, 4, 6]
    weights = [_weights(tmp_path, records[name]) for name in ("dies_once", "linear_attention")]
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) > 0
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0]), "as if nothing had happened"
    assert read_status(tmp_path / "run").counts["failed"] == 1


def _log(tmp_path: Path, record: dict) -> list[str]:
    return (tmp_path / "run" / "cells" / record["cell"] / "metrics.jsonl").read_text().splitlines()


def _weights(tmp_path: Path, record: dict) -> dict:
    return load_file(tmp_path / "run" / "cells" / record["cell"] / "adapter" / "adapter.safetensors")
