"""Run a grid: its unfinished cells one after another, then the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.ablation import store
from experiments.ablation.cell import run_cell
from experiments.config import Evaluation, Grid
from experiments.data.emoji import LICENCE
from experiments.distil import Setting, open_setting
from experiments.evaluate.pictures import save_samples
from mixers import registry

Report = Callable[[int, int, str, str, int, int], None]


def run_grid(grid: Grid, directory: Path, report: Report) -> list[dict[str, Any]]:
    """Run every cell that is not finished; returns the records of the cells that ran.

    A cell that fails records its error and the others go on. Killed and started again with the
    same grid, finished cells are kept and the running one goes on from its last checkpoint; with a
    changed grid, cells whose configuration is unchanged are kept.

    Args:
        grid: what to run.
        directory: receives grid.json, teacher/, cells/<id>/.
        report: called as (cells done, cells, label, phase, done, total).
    """
    cells = grid.cells()
    for variant in grid.variants:
        registry.entry(variant.mixer)  # an unknown name fails here, before any work
    report(0, len(cells), "teacher", "load", 0, 1)
    plan = grid.distillation
    setting = open_setting(grid.teacher, grid.data, plan.image_size, plan.images, plan.all_sizes[1:])
    store.write_json(directory / "grid.json", describe(grid))
    show_teacher(setting, grid.evaluation, directory / "teacher")
    records = []
    for number, cell in enumerate(cells):
        folder = directory / "cells" / cell.id
        if store.finished(folder):
            continue

        def tell(phase: str, done: int, total: int, number: int = number, label: str = cell.variant.label) -> None:
            report(number, len(cells), label, phase, done, total)

        try:
            records.append(run_cell(cell, setting, folder, tell))
        except Exception as error:
            records.append(store.failure(cell.id, cell.variant.name, cell.seed, error))
            store.write_json(folder / "result.json", records[-1])
    report(len(cells), len(cells), "all cells", "done", 1, 1)
    return records


def describe(grid: Grid) -> dict[str, Any]:
    """grid.json: what the report needs to know of the grid; variants with their defaults filled in."""
    evaluation = grid.evaluation
    variants = []
    for variant in grid.variants:
        entry, row = registry.entry(variant.mixer), variant.model_dump(mode="json")
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
        "reference": "teacher",
        "variants": variants,
        "protocol": {
            "distillation": grid.distillation.model_dump(mode="json"),
            "evaluation": evaluation.model_dump(mode="json"),
        },
        "environment": store.environment(),
        "notes": [LICENCE] if grid.data == "emoji" else [],
    }


def show_teacher(setting: Setting, plan: Evaluation, directory: Path) -> None:
    """The teacher's own samples, once, and real held-out pictures at the same sizes."""
    if not plan.sample_sizes or not plan.prompts:
        return
    last = directory / "samples" / str(plan.sample_sizes[-1]) / f"{len(plan.prompts) - 1}.png"
    if not last.exists():
        save_samples(setting.pipe, plan, directory / "samples")
