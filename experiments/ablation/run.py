"""Run a grid: its unfinished cells, one after another or spread over processes and machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from time import time
from typing import Any

from experiments.ablation import store
from experiments.ablation.budget import note
from experiments.ablation.cell import setting_of
from experiments.ablation.spread import Spread, Work, in_turn
from experiments.config import CellConfig, EvaluationConfig, Grid
from experiments.core.environment import describe_environment
from experiments.core.files import read_json, write_json
from experiments.data.emoji import LICENSE
from experiments.distill import DistillationContext
from experiments.evaluate.pictures import save_samples
from experiments.evaluate.protocol import FILE, freeze, protocol_of
from mixers import registry
from mixers.suggest import hint

Report = Callable[[int, int, str, str, int, int], None]


def run_grid(
    grid: Grid,
    directory: Path,
    report: Report,
    *,
    only: str = "*",
    spread: Spread = in_turn,
    plugins: Sequence[Path] = (),
    budget: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Run every cell that is not finished; returns the records of the cells that ran.

    A cell that fails records its error and the others go on. Killed and started again with the
    same grid, finished cells are kept and the running one goes on from its last checkpoint; with a
    changed grid, cells whose configuration is unchanged are kept. Two runs of one folder at once
    share its cells.

    Args:
        grid: what to run.
        directory: receives grid.json, protocol.json, teacher/, cells/<id>/.
        report: called as (cells done, cells, label, phase, done, total).
        only: run the variants whose name matches this pattern.
        spread: how; `in_processes` and `on_ray` are others.
        plugins: files that register mixers, for other processes; here they are loaded already.
        budget: what scaled the grid, as `fit_budget` gives it; kept in grid.json, and told in its notes.

    Raises:
        ValueError: no variant of that name, no such mixer, teacher or data; the directory holds a run of a grid of
            another name; or finished cells of this grid were measured by another protocol, as where the teacher's
            weights have changed.
    """
    cells, since = chosen(grid, only), time()
    there = read_json(directory / "grid.json").get("name", grid.name)
    if there != grid.name:
        raise ValueError(f"{directory} holds a run of the grid {there}, not of {grid.name}: give another --out.")
    for variant in grid.variants:
        registry.get_mixer_entry(variant.mixer)  # an unknown name fails here, before any work
    report(0, len(cells), "teacher", "load", 0, 1)
    work, setting = Work(directory.absolute(), since, tuple(path.absolute() for path in plugins)), setting_of(grid)
    before = read_json(directory / FILE).get("hash")
    now = freeze(protocol_of(setting, grid.evaluation, grid.data), directory, protocols(grid, work))
    write_json(directory / "grid.json", describe(grid, budget))
    show_teacher(setting, grid.evaluation, directory / "teacher", again=before != now)
    waiting = [cell for cell in cells if not store.finished(work.folder(cell))]
    done, records = len(cells) - len(waiting), []

    def tell(cell: CellConfig, phase: str, step: int, steps: int) -> None:
        report(done, len(cells), f"{cell.variant.label}, seed {cell.seed}", phase, step, steps)

    for record in spread(waiting, work, tell):
        done += 1
        records += [record] if record else []
    report(done, len(cells), "all cells", "done", 1, 1)
    return records


def chosen(grid: Grid, only: str = "*") -> list[CellConfig]:
    """The cells of the variants whose name matches a wildcard pattern.

    Raises:
        ValueError: there is none.
    """
    cells = [cell for cell in grid.cells() if fnmatchcase(cell.variant.name, only)]
    if not cells:
        names = [variant.name for variant in grid.variants]
        raise ValueError(f"No variant of {grid.name} matches {only!r}: it has {', '.join(names)}.{hint(only, names)}")
    return cells


def protocols(grid: Grid, work: Work) -> set[str]:
    """By which protocols, as hashes, the finished cells were measured; older records tell none."""
    folders = [work.folder(cell) for cell in grid.cells()]
    records = [read_json(folder / "result.json") for folder in folders if store.finished(folder)]
    return {record["protocol"] for record in records if "protocol" in record}


def describe(grid: Grid, budget: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """grid.json: what the report needs to know of the grid; variants with their defaults filled in."""
    evaluation = grid.evaluation
    variants = []
    for variant in grid.variants:
        entry, row = registry.get_mixer_entry(variant.mixer), variant.model_dump(mode="json")
        row["causality"] = variant.causality or entry.default_causality
        row["normalize"] = entry.default_normalize if variant.normalize is None else variant.normalize
        variants.append(row)
    return {
        "name": grid.name,
        "question": grid.question,
        "teacher": grid.teacher,
        "data": grid.data,
        "train_size": grid.distillation.image_size,
        "sizes": list(evaluation.sizes),
        "sample_sizes": list(evaluation.sample_sizes),
        "prompts": list(evaluation.prompts),
        "seeds": list(grid.seeds),
        "reference": grid.reference or next((v.name for v in grid.variants if v.trained), None),
        "variants": variants,
        "claims": [claim.model_dump(mode="json") for claim in grid.claims],
        "cells": [{"id": cell.id, "variant": cell.variant.name, "seed": cell.seed} for cell in grid.cells()],
        "protocol": {
            "distillation": grid.distillation.model_dump(mode="json"),
            "evaluation": evaluation.model_dump(mode="json"),
        },
        "environment": describe_environment(),
        "notes": [*([LICENSE] if grid.data == "emoji" else []), *([note(budget)] if budget else [])],
        "budget": dict(budget) if budget else None,
    }


def show_teacher(setting: DistillationContext, plan: EvaluationConfig, directory: Path, again: bool = False) -> None:
    """The teacher's own samples, once; `again` where those there are of another protocol."""
    if not plan.sample_sizes or not plan.prompts:
        return
    last = directory / "samples" / str(plan.sample_sizes[-1]) / f"{len(plan.prompts) - 1}.png"
    if again or not last.exists():
        save_samples(setting.pipe, plan, directory / "samples")
