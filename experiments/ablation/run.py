"""Run a grid: its unfinished cells, through an executor."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from time import time

from experiments.ablation.budget import describe_budget
from experiments.ablation.cell import open_cell_context, training_key
from experiments.ablation.description import FILE, Budget, describe_run
from experiments.ablation.executors import CellExecutor, RunSettings, run_serially
from experiments.ablation.result import CellResult, is_done, read_result
from experiments.config import CellConfig, EvaluationConfig, Grid
from experiments.core.files import read_json, write_json
from experiments.core.locks import try_lock
from experiments.distill import DistillationContext
from experiments.evaluate.protocol import freeze_protocol, protocol_of
from experiments.evaluate.samples import save_samples
from mixers import registry
from mixers.suggest import hint

SAMPLED = "samples.json"

RunProgressCallback = Callable[[int, int, str, str, int, int], None]
"""Called as (cells done, cells, label, phase, done, total)."""


def run_grid(
    grid: Grid,
    directory: Path,
    progress: RunProgressCallback,
    *,
    only: str | Sequence[str] = "*",
    executor: CellExecutor = run_serially,
    plugins: Sequence[Path] = (),
    budget: Budget | None = None,
) -> list[CellResult]:
    """Run every cell that is not finished and return the results of the cells that ran.

    A cell that fails records its error and the others continue. After an interruption, the same grid keeps finished
    cells and resumes the running one from its last checkpoint; a changed grid keeps the cells whose configuration,
    teacher and data are unchanged. Two runs of one folder at once share its cells.

    Args:
        grid: what to run.
        directory: receives grid.json, protocol.json, teacher/, cells/<id>/.
        progress: called as (cells done, cells, label, phase, done, total).
        only: run the variants whose name matches this wildcard pattern, or one of these.
        executor: how cells are executed; `run_in_processes` and `run_on_ray` are others.
        plugins: files that register mixers, objectives or metrics, for other processes; here they are loaded already.
        budget: what scaled the grid, from `fit_budget`; recorded in grid.json.

    Raises:
        ValueError: there is no variant of that name, no such mixer, teacher or data; the directory holds a run of
            another grid; or finished cells of this grid were measured by another protocol.
    """
    cells = select_cells(grid, only)
    existing = read_json(directory / FILE).get("name", grid.name)
    if existing != grid.name:
        raise ValueError(f"{directory} holds a run of the grid {existing}, not of {grid.name}: give another --out.")
    for variant in grid.variants:
        registry.get_mixer_entry(variant.mixer)  # an unknown name fails here, before any work
    progress(0, len(cells), "teacher", "load", 0, 1)
    settings = RunSettings(directory.absolute(), time(), tuple(path.absolute() for path in plugins))
    context = open_cell_context(grid)
    protocol = protocol_of(context, grid.evaluation, grid.data)
    protocol_hash = freeze_protocol(protocol, directory, measured_protocols(grid, settings))
    note = describe_budget(budget) if budget else ""
    write_json(directory / FILE, describe_run(grid, budget, note).model_dump(mode="json"))
    sample_teacher(context, grid.evaluation, directory / "teacher", protocol_hash)
    waiting = [cell for cell in cells if not is_done(settings.cell_folder(cell), training_key(cell, context))]
    done = len(cells) - len(waiting)
    results = []

    def report(cell: CellConfig, phase: str, step: int, steps: int) -> None:
        progress(done, len(cells), f"{cell.variant.label}, seed {cell.seed}", phase, step, steps)

    for result in executor(waiting, settings, report):
        done += 1
        results += [result] if result else []
    progress(done, len(cells), "all cells", "done", 1, 1)
    return results


def select_cells(grid: Grid, only: str | Sequence[str] = "*") -> list[CellConfig]:
    """Return the cells of the variants whose name matches a wildcard pattern, or one of several.

    Raises:
        ValueError: there is none for one of the patterns.
    """
    patterns = (only,) if isinstance(only, str) else only
    names = [variant.name for variant in grid.variants]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            expected = ", ".join(names)
            raise ValueError(f"No variant of {grid.name} matches {pattern!r}: it has {expected}.{hint(pattern, names)}")
    return [cell for cell in grid.cells() if any(fnmatchcase(cell.variant.name, pattern) for pattern in patterns)]


def measured_protocols(grid: Grid, settings: RunSettings) -> set[str]:
    """Return the hashes of the protocols that the grid's finished cells were measured by."""
    results = [read_result(settings.cell_folder(cell)) for cell in grid.cells()]
    return {result.measurements.protocol for result in results if result and result.measurements}


def sample_teacher(context: DistillationContext, plan: EvaluationConfig, directory: Path, protocol_hash: str) -> None:
    """Replace the teacher's samples unless they are complete and of this protocol.

    Args:
        context: with the teacher, on which nothing is mounted.
        plan: prompts, sizes and guidance scales.
        directory: receives samples/ and, when they are complete, samples.json with the hash of their protocol.
        protocol_hash: of the run.
    """
    with try_lock(directory) as acquired:
        if not acquired or read_json(directory / SAMPLED).get("protocol") == protocol_hash:
            return  # complete, or another process of this run draws them
        (directory / SAMPLED).unlink(missing_ok=True)
        shutil.rmtree(directory / "samples", ignore_errors=True)
        save_samples(context.pipe, plan, directory / "samples")
        write_json(directory / SAMPLED, {"protocol": protocol_hash})
