"""A budget of time: one factor on every cell's steps, from a short measurement of this machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from experiments.ablation.cell import setting_of
from experiments.ablation.spread import threads
from experiments.config import CellConfig, DistillationConfig, Grid, TrainingStage
from experiments.core.files import read_json
from experiments.distill import build_student, run_stages
from experiments.evaluate.measure import measure

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MARGIN = 0.9
"""The share of a budget that is planned for: processes start, pictures are encoded, and no machine is quite steady."""

Report = Callable[[str, int, int], None]


LONGEST = 10 * 366 * 24 * 3600.0


def parse_duration(text: str) -> float:
    """Seconds of "90s", "30m", "2h", "1d" or "1h30m".

    Raises:
        ValueError: it is none of these, or no time at all.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not 0 < seconds <= LONGEST:
        raise ValueError(f"Expected a time as 90s, 30m, 2h or 1h30m, up to ten years, got {text!r}.")
    return seconds


def fit_budget(
    grid: Grid, cells: list[CellConfig], seconds: float, workers: int, directory: Path, report: Report
) -> tuple[Grid, dict[str, Any]]:
    """The grid with every stage's steps times one factor, so that `cells` take about `seconds`.

    The factor may be above one. A run that is started again has that of its first start, as other steps would be
    other cells.

    Args:
        cells: those of the grid that will run.
        workers: cells at a time.
        directory: of the run, whose grid.json may have the factor.
        report: called as (phase, done, total).

    Returns:
        The grid, and what grid.json keeps as "budget": seconds, factor, plan (a hash of what was scaled).

    Raises:
        ValueError: the budget is too short for one step of training a cell.
    """
    plan = _hash(grid)
    known = read_json(directory / "grid.json").get("budget") or {}
    if known.get("plan") == plan and known.get("seconds") == seconds:
        return scaled(grid, known["factor"]), known
    began = perf_counter()
    training, rest = _cost(cells, workers, report)
    room = (MARGIN * seconds - (perf_counter() - began)) * workers - rest
    most = max((stage.fit.steps for cell in cells for stage in cell.distillation.stages), default=1)
    if room < training / most:
        needed = timedelta(seconds=60 + round((rest + training / most) / MARGIN / workers))
        raise ValueError(
            f"A budget of {timedelta(seconds=seconds)} is too short for {len(cells)} cells: evaluating them takes "
            f"about {timedelta(seconds=round(rest / workers))}. Expected {needed} at least; or take fewer cells "
            "(--only, --seeds), more --workers, or a smaller evaluation (--set evaluation.…)."
        )
    factor = float(f"{room / training:.3g}") if training else 1.0  # three digits, as it will be told
    return scaled(grid, factor), {"seconds": seconds, "factor": factor, "plan": plan}


def note(budget: Mapping[str, Any]) -> str:
    """What the report says of it."""
    return (
        f"A budget of {timedelta(seconds=round(budget['seconds']))} scaled the training steps of every cell by "
        f"{budget['factor']:g}."
    )


def scaled(grid: Grid, factor: float) -> Grid:
    """The grid with every stage's steps, warm-up and objectives' starts and ramps times a factor; at least one step."""
    variants = tuple(
        variant.model_copy(update={"distillation": variant.distillation and _plan(variant.distillation, factor)})
        for variant in grid.variants
    )
    return grid.model_copy(update={"variants": variants, "distillation": _plan(grid.distillation, factor)})


def _plan(plan: DistillationConfig, factor: float) -> DistillationConfig:
    before = tuple(stage.model_copy(update=_stage(stage, factor)) for stage in plan.before)
    return plan.model_copy(update={**_stage(plan, factor), "before": before})


def _stage(stage: TrainingStage, factor: float) -> dict[str, Any]:
    """The fields of a stage that are counted in steps."""

    def times(steps: int) -> int:
        return round(steps * factor)

    fit = {"steps": max(1, times(stage.fit.steps)), "warmup": times(stage.fit.warmup)}
    terms = {
        name: term.model_copy(update={"start": times(term.start), "ramp": times(term.ramp)})
        for name, term in stage.objectives.items()
    }
    return {"fit": stage.fit.model_copy(update=fit), "objectives": terms}


def _cost(cells: list[CellConfig], workers: int, report: Report) -> tuple[float, float]:
    """Seconds of all cells one after another, of training and of all the rest, with a worker's threads.

    Measured, a step for every stage and variant, and the evaluation of one variant, which is taken to be that of all;
    twice, as the first in a process has the teacher's part in it.
    """
    by_variant: dict[str, list[CellConfig]] = {}
    for cell in cells:
        by_variant.setdefault(cell.variant.name, []).append(cell)
    groups = sorted(by_variant.values(), key=lambda group: not group[0].variant.trained)
    before, training, total = torch.get_num_threads(), 0.0, len(groups) + 2
    torch.set_num_threads(min(before, threads(workers)))
    try:
        with torch.random.fork_rng(), TemporaryDirectory() as folder:
            for number, group in enumerate(groups):
                report("measure a step", number, total)
                seconds = [_training(group[0], Path(folder) / f"{number}-{n}") for n in range(1 + (number == 0))]
                training += len(group) * seconds[-1]  # the very first step of all is slow
            rest = 0.0
            for number, count in enumerate((min(workers, len(cells)), max(0, len(cells) - workers))):
                report("measure an evaluation", len(groups) + number, total)
                rest += count * _evaluation(groups[0][0], Path(folder))
    finally:
        torch.set_num_threads(before)
    return training, rest


def _training(cell: CellConfig, folder: Path) -> float:
    """Seconds of a cell's training, from one step of every stage."""
    if not cell.variant.trained:
        return 0.0
    plan, setting = cell.distillation, setting_of(cell)
    try:
        adapter = build_student(setting.teacher, cell.variant.mixer, cell.variant, plan, cell.seed)
        records = run_stages(setting.teacher, adapter, _plan(plan, 0), setting.batch, folder, lambda *_: None)
    except Exception:  # whatever is wrong with this cell, its record will say it
        return 0.0
    return sum(record["seconds"] * stage.fit.steps for record, stage in zip(records, plan.stages, strict=True))


def _evaluation(cell: CellConfig, folder: Path) -> float:
    """Seconds of all that a cell does beside training."""
    setting = setting_of(cell)
    adapter = build_student(setting.teacher, cell.variant.mixer, cell.variant, cell.distillation, cell.seed)
    began = perf_counter()
    try:
        measure(setting, adapter, cell.evaluation, cell.data, cell.distillation.image_size, folder, lambda *_: None)
    finally:
        adapter.unmount()
    return perf_counter() - began


def _hash(grid: Grid) -> str:
    """Of what a budget scales."""
    plans = [grid.distillation, *(variant.distillation for variant in grid.variants)]
    text = json.dumps([plan and plan.model_dump(mode="json") for plan in plans], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
