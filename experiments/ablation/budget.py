"""A budget of time: one factor on every cell's training steps, from a short measurement of this machine."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from pydantic import ValidationError

from experiments.ablation.cell import open_cell_context
from experiments.ablation.description import FILE, Budget
from experiments.config import CellConfig, DistillationConfig, Grid, TrainingStage
from experiments.core.devices import threads_per_process
from experiments.core.files import read_json
from experiments.core.progress import ProgressCallback, ignore_progress
from experiments.distill import build_student, run_stages
from experiments.evaluate.measure import measure_student
from experiments.metrics.inputs.student import EvaluatedStudent

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MARGIN = 0.9
"""Share of a budget that is planned for: starting processes and encoding images take time too, and machines vary."""
LONGEST = 10 * 366 * 24 * 3600.0


def parse_duration(text: str) -> float:
    """Return the seconds of "90s", "30m", "2h", "1d" or "1h30m".

    Raises:
        ValueError: it is none of these, or not a positive time up to ten years.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not 0 < seconds <= LONGEST:
        raise ValueError(f"Expected a time as 90s, 30m, 2h or 1h30m, up to ten years, got {text!r}.")
    return seconds


def fit_budget(
    grid: Grid, cells: list[CellConfig], seconds: float, workers: int, directory: Path, progress: ProgressCallback
) -> tuple[Grid, Budget]:
    """Scale the steps of every stage by one factor, so that `cells` take about `seconds`.

    The factor can be above one. A run that is started again uses the factor of its first start, as other steps would
    make other cells.

    Args:
        grid: to scale.
        cells: those of the grid that will run.
        seconds: the budget.
        workers: cells at a time.
        directory: of the run, whose grid.json may have the factor.
        progress: called as (phase, done, total).

    Returns:
        The scaled grid, and the budget that grid.json records.

    Raises:
        ValueError: the budget is too short for one training step of a cell.
    """
    plan = _hash(grid)
    recorded = _recorded_budget(directory)
    if recorded is not None and recorded.plan == plan and recorded.seconds == seconds:
        return scale_grid(grid, recorded.factor), recorded
    start = perf_counter()
    training, rest = _measure_cost(cells, workers, progress)
    available = (MARGIN * seconds - (perf_counter() - start)) * workers - rest
    most_steps = max((stage.fit.steps for cell in cells for stage in cell.distillation.stages), default=1)
    if available < training / most_steps:
        needed = timedelta(seconds=60 + round((rest + training / most_steps) / MARGIN / workers))
        raise ValueError(
            f"A budget of {timedelta(seconds=seconds)} is too short for {len(cells)} cells: evaluating them takes "
            f"about {timedelta(seconds=round(rest / workers))}. Expected {needed} at least; or take fewer cells "
            "(--only, --seeds), more --workers, or a smaller evaluation (--set evaluation.…)."
        )
    factor = float(f"{available / training:.3g}") if training else 1.0  # three digits, as it will be printed
    return scale_grid(grid, factor), Budget(seconds=seconds, factor=factor, plan=plan)


def describe_budget(budget: Budget) -> str:
    """Return the report's sentence about a budget."""
    return (
        f"A budget of {timedelta(seconds=round(budget.seconds))} scaled the training steps of every cell by "
        f"{budget.factor:g}."
    )


def scale_grid(grid: Grid, factor: float) -> Grid:
    """Multiply every stage's steps and warm-up, and its objectives' starts and ramps; at least one step remains."""
    variants = tuple(
        variant.model_copy(
            update={"distillation": variant.distillation and scale_distillation(variant.distillation, factor)}
        )
        for variant in grid.variants
    )
    return grid.model_copy(update={"variants": variants, "distillation": scale_distillation(grid.distillation, factor)})


def scale_distillation(plan: DistillationConfig, factor: float) -> DistillationConfig:
    """Multiply everything in a plan that is counted in training steps."""
    before = tuple(stage.model_copy(update=_scaled_fields(stage, factor)) for stage in plan.before)
    return plan.model_copy(update={**_scaled_fields(plan, factor), "before": before})


def _scaled_fields(stage: TrainingStage, factor: float) -> dict[str, Any]:
    def scale(steps: int) -> int:
        return round(steps * factor)

    fit = {"steps": max(1, scale(stage.fit.steps)), "warmup": scale(stage.fit.warmup)}
    terms = {
        name: term.model_copy(update={"start": scale(term.start), "ramp": scale(term.ramp)})
        for name, term in stage.objectives.items()
    }
    return {"fit": stage.fit.model_copy(update=fit), "objectives": terms}


def _recorded_budget(directory: Path) -> Budget | None:
    try:
        return Budget.model_validate(read_json(directory / FILE).get("budget"))
    except ValidationError:
        return None


def _measure_cost(cells: list[CellConfig], workers: int, progress: ProgressCallback) -> tuple[float, float]:
    """Return the seconds of all cells one after another, of training and of everything else, with a worker's threads.

    Measures a step of every stage and variant, and the evaluation of one variant, which stands for all; that twice, as
    the first one in a process includes the teacher's share.
    """
    by_variant: dict[str, list[CellConfig]] = {}
    for cell in cells:
        by_variant.setdefault(cell.variant.name, []).append(cell)
    groups = sorted(by_variant.values(), key=lambda group: not group[0].variant.trained)
    threads = torch.get_num_threads()
    total = len(groups) + 2
    training = 0.0
    torch.set_num_threads(min(threads, threads_per_process(workers)))
    try:
        with torch.random.fork_rng(), TemporaryDirectory() as folder:
            for number, group in enumerate(groups):
                progress("measure a step", number, total)
                repeats = 2 if number == 0 else 1  # the very first step is slow
                seconds = [_training_seconds(group[0], Path(folder) / f"{number}-{n}") for n in range(repeats)]
                training += len(group) * seconds[-1]
            rest = 0.0
            first = min(len(cells), workers * len({cell.seed for cell in cells}))  # each seed has noise of its own
            for number, count in enumerate((first, len(cells) - first)):
                progress("measure an evaluation", len(groups) + number, total)
                rest += count * _evaluation_seconds(groups[0][0], Path(folder))
    finally:
        torch.set_num_threads(threads)
    return training, rest


def _training_seconds(cell: CellConfig, folder: Path) -> float:
    """Estimate the seconds of a cell's training from one step of every stage."""
    if not cell.variant.trained:
        return 0.0
    plan = cell.distillation
    context = open_cell_context(cell)
    try:
        adapter = build_student(context.teacher, cell.variant.mixer, cell.variant, plan, cell.seed)
        one_step = scale_distillation(plan, 0)
        records = run_stages(context.teacher, adapter, one_step, context.batch, folder, lambda *_: None)
    except Exception:  # whatever is wrong with this cell, its result will say it
        return 0.0
    return sum(record["seconds"] * stage.fit.steps for record, stage in zip(records, plan.stages, strict=True))


def _evaluation_seconds(cell: CellConfig, folder: Path) -> float:
    """Measure the seconds of everything that a cell does beside training."""
    context = open_cell_context(cell)
    adapter = build_student(context.teacher, cell.variant.mixer, cell.variant, cell.distillation, cell.seed)
    start = perf_counter()
    try:
        student = EvaluatedStudent(context, adapter, cell.evaluation, cell.data, cell.seed)
        measure_student(student, cell.distillation.image_size, folder, ignore_progress)
    finally:
        adapter.unmount()
    return perf_counter() - start


def _hash(grid: Grid) -> str:
    """Hash what a budget scales."""
    plans = [grid.distillation, *(variant.distillation for variant in grid.variants)]
    text = json.dumps([plan and plan.model_dump(mode="json") for plan in plans], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
