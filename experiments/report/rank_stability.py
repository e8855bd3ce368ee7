"""Whether the order of rows stays the same when they are trained longer or at other learning rates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import combinations

from scipy import stats

from experiments.ablation.description import VariantDescription
from experiments.core.statistics import Interval
from experiments.report.errors import mean_error, ratio
from experiments.report.run_files import DESIGN_FIELDS, RunRecord

MOST_SWAPS = 3
"""Swapped pairs of rows that the statement names."""
STABLE_TAU = 0.8
"""Smallest Kendall's τ between any two training settings of ranks that are called stable."""
Setting = tuple[int, float]
"""Training steps of all stages, and the learning rate of the last."""


def describe_rank_stability(run: RunRecord) -> list[str]:
    """Compare the order of rows between training settings at the training size.

    A swap is a pair of designs whose order differs between two settings, with an interval that excludes equality in
    both. Kendall's τ is 1 for equal and −1 for reversed orders. Ranks are stable if τ is high and no pair swaps, and it
    is undecided whether they are if errors have no intervals, as of a single seed.

    Returns:
        One statement, or none if the run has a single training setting.
    """
    settings = _rows_by_setting(run)
    if len(settings) < 2:
        return []
    orders = []
    swaps = []
    has_bounds = True
    for first, second in combinations(settings, 2):
        shared = [design for design in settings[first] if design in settings[second]]
        if len(shared) < 2:
            continue
        errors = [[mean_error(run, settings[s][design], run.train_size) for design in shared] for s in (first, second)]
        if any(error is None for row in errors for error in row):
            continue
        orders.append(float(stats.kendalltau(*errors).statistic))
        ratios = _ratios(run, settings, first, second, shared)
        has_bounds &= len(ratios) == math.comb(len(shared), 2)
        has_bounds &= all(value.has_bounds for pair in ratios.values() for value in pair)
        swaps += list(_swaps(ratios, settings, first, second))
    if not orders:
        return []
    spread = f"Kendall's τ between training settings (steps and learning rates) is {min(orders):.2f} at least"
    if not swaps and not has_bounds:
        return [
            f"Whether the ranks of the rows are stable at {run.train_size} px is undecided: {spread}, but some errors "
            "have no interval, as of a single seed."
        ]
    if not swaps and not min(orders) >= STABLE_TAU:
        return [
            f"Whether the ranks of the rows are stable at {run.train_size} px is undecided: {spread}, but no pair of "
            "rows swaps its order beyond its intervals."
        ]
    if not swaps:
        return [
            f"The ranks of the rows are stable at {run.train_size} px: {spread}, and no pair of rows swaps its order."
        ]
    more = f"; and {len(swaps) - MOST_SWAPS} more" if len(swaps) > MOST_SWAPS else ""
    return [
        f"The ranks of the rows are NOT stable at {run.train_size} px: {spread}, and {len(swaps)} pairs swap their "
        f"order: {'; '.join(swaps[:MOST_SWAPS])}{more}. Conclusions hold for the training setting they are drawn at."
    ]


def _rows_by_setting(run: RunRecord) -> dict[Setting, dict[str, VariantDescription]]:
    """Training setting -> design -> row; designs are what rows are beside their distillation."""
    settings: dict[Setting, dict[str, VariantDescription]] = {}
    for variant in run.trained:
        plan = variant.distillation
        if plan is None:
            continue
        setting = (sum(stage.fit.steps for stage in plan.stages), plan.fit.learning_rate)
        fields = [getattr(variant, field) for field in DESIGN_FIELDS if field != "distillation"]
        settings.setdefault(setting, {})[json.dumps(fields, sort_keys=True, default=str)] = variant
    return settings


def _ratios(
    run: RunRecord,
    settings: dict[Setting, dict[str, VariantDescription]],
    first: Setting,
    second: Setting,
    designs: list[str],
) -> dict[tuple[str, str], list[Interval]]:
    """The ratios of the errors of every two designs in both settings; those that share no seed are left out."""
    ratios = {}
    for a, b in combinations(designs, 2):
        both = [ratio(run, settings[s][a], settings[s][b], run.train_size) for s in (first, second)]
        defined = [value for value in both if value is not None]
        if len(defined) == 2:
            ratios[a, b] = defined
    return ratios


def _swaps(
    ratios: dict[tuple[str, str], list[Interval]],
    settings: dict[Setting, dict[str, VariantDescription]],
    first: Setting,
    second: Setting,
) -> Iterator[str]:
    for designs, (before, after) in ratios.items():
        if before.excludes(1.0) and after.excludes(1.0) and (before.mean < 1) != (after.mean < 1):
            labels = [settings[first][design].label for design in designs]
            yield f"“{labels[0]}” and “{labels[1]}” between {_name(first)} and {_name(second)}"


def _name(setting: Setting) -> str:
    return f"{setting[0]} steps at {setting[1]:g}"
