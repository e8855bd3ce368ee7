"""A row's errors by seed and image, and ratios of two rows' errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from experiments.ablation.description import VariantDescription
from experiments.core.statistics import Interval, interval_over_seeds, log_ratios
from experiments.report.run_files import RunRecord

METRIC = "relative_error_to_teacher"
"""The quantity that factors, claims and the main table are about."""

ErrorsBySeed = dict[int, NDArray[np.float64]]
"""Seed -> errors (images,), or (1,) if a record has only their mean."""


def errors_by_seed(run: RunRecord, variant: VariantDescription, size: int) -> ErrorsBySeed:
    """Return a row's relative errors to the teacher at a size, image by image."""
    errors = {}
    for cell in run.done(variant.name):
        row = cell.fidelity.get(size)
        if cell.seed is None or row is None:
            continue
        by_image = np.asarray(row.error_by_image, dtype=np.float64)
        if by_image.size and row.error_to_teacher > 0:
            errors[cell.seed] = by_image / row.error_to_teacher * row.relative_error_to_teacher
        else:
            errors[cell.seed] = np.array([row.relative_error_to_teacher])
    return errors


def mean_error(run: RunRecord, variant: VariantDescription, size: int) -> float | None:
    """Return a row's mean error over seeds and images; None if nothing was measured."""
    errors = errors_by_seed(run, variant, size)
    return float(np.mean([values.mean() for values in errors.values()])) if errors else None


def log_ratios_of(
    run: RunRecord, variant: VariantDescription, reference: VariantDescription, size: int
) -> Mapping[int, NDArray[np.float64]]:
    """Return log(error of the row / error of the reference), image by image, for the seeds that both have."""
    return log_ratios(errors_by_seed(run, variant, size), errors_by_seed(run, reference, size))


def ratio(run: RunRecord, variant: VariantDescription, reference: VariantDescription, size: int) -> Interval | None:
    """Return a row's error over the reference's as a geometric mean; None if they share no seed."""
    logs = log_ratios_of(run, variant, reference, size)
    return interval_over_seeds(logs).exp() if logs else None


def pooled_ratio(logs: Sequence[Mapping[int, NDArray[np.float64]]]) -> Interval:
    """Return the geometric mean of ratios over pairs of rows, seeds and images, with its interval.

    Args:
        logs: log ratios (images,) by seed, of each pair; seeds and images that some pair lacks are left out.

    Returns:
        NaN with a count of 0 if the pairs share no seed.
    """
    shared = sorted(set.intersection(*(set(by_seed) for by_seed in logs))) if logs else []
    images = min((len(by_seed[seed]) for by_seed in logs for seed in shared), default=0)
    if not images:
        return Interval(math.nan, math.nan, math.nan, 0)
    means = {seed: np.mean([by_seed[seed][:images] for by_seed in logs], axis=0) for seed in shared}
    return interval_over_seeds(means).exp()
