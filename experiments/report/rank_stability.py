"""Whether the order of rows stays the same when they are trained longer or at other learning rates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations

from scipy import stats

from experiments.ablation.description import VariantDescription
from experiments.report.errors import mean_error, ratio
from experiments.report.run_files import DESIGN_FIELDS, RunRecord

MOST_SWAPS = 3
"""Swapped pairs of rows that the statement names."""
Setting = tuple[int, float]
"""Training steps of all stages, and the learning rate of the last."""


def describe_rank_stability(run: RunRecord) -> list[str]:
    """Compare the order of rows between training settings at the training size.

    A swap is a pair of designs whose order differs between two settings, with an interval that excludes equality in
    both. Kendall's τ is 1 for equal and −1 for reversed orders.

    Returns:
        One statement, or none if the run has a single training setting.
    """
    settings = _rows_by_setting(run)
    if len(settings) < 2:
        return []
    orders = []
    swaps = []
    for first, second in combinations(settings, 2):
        shared = [design for design in settings[first] if design in settings[second]]
        if len(shared) < 2:
            continue
        errors = [[mean_error(run, settings[s][design], run.train_size) for design in shared] for s in (first, second)]
        if any(error is None for row in errors for error in row):
            continue
        orders.append(float(stats.kendalltau(*errors).statistic))
        swaps += list(_swaps(run, settings, first, second, shared))
    if not orders:
        return []
    spread = f"Kendall's τ between training settings (steps and learning rates) is {min(orders):.2f} at least"
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


def _swaps(
    run: RunRecord,
    settings: dict[Setting, dict[str, VariantDescription]],
    first: Setting,
    second: Setting,
    designs: list[str],
) -> Iterator[str]:
    for a, b in combinations(designs, 2):
        ratios = [ratio(run, settings[s][a], settings[s][b], run.train_size) for s in (first, second)]
        if all(value is not None and value.excludes(1.0) for value in ratios):
            before, after = (value.mean for value in ratios if value is not None)
            if (before < 1) != (after < 1):
                labels = [settings[first][design].label for design in (a, b)]
                yield f"“{labels[0]}” and “{labels[1]}” between {_name(first)} and {_name(second)}"


def _name(setting: Setting) -> str:
    return f"{setting[0]} steps at {setting[1]:g}"
