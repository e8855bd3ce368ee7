"""Confidence intervals and tests; every interval of the project comes from here.

Two ways, both for a mean of paired differences or log ratios:

    crossed_interval     Student's t over training seeds × images, which are crossed: every seed sees the same images
    bootstrap_interval   percentile bootstrap over independent values, such as images (Efron 1979)

A single training seed gives no interval: its variance cannot be estimated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

LEVEL = 0.95
"""Confidence level of all intervals."""
RESAMPLES = 10_000
_ROUNDING = 1e-12  # differences and log ratios below it are rounding errors


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: the estimate.
        low, high: bounds; NaN if the values allow no interval.
        count: independent units behind it, which are seeds or images.
        p_value: two-sided, for the hypothesis that the mean is 0 (for ratios: 1); NaN without an interval.
    """

    mean: float
    low: float
    high: float
    count: int
    p_value: float = math.nan

    @property
    def has_bounds(self) -> bool:
        """Whether there is an interval, and not only an estimate."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def excludes(self, value: float) -> bool:
        """Whether there is an interval and `value` lies outside."""
        return self.low > value or self.high < value

    def exp(self) -> Interval:
        """Return the interval of ratios that belongs to this one of log ratios; its center is a geometric mean."""
        return Interval(_exp(self.mean), _exp(self.low), _exp(self.high), self.count, self.p_value)


def crossed_interval(values: ArrayLike, level: float = LEVEL) -> Interval:
    """Mean of values over seeds and images, with Student's t interval for new seeds and new images at once.

    With s_a² the variance of the S means of seeds and s_b² that of the I means of images, the interval reaches
    √(t²(S − 1)·s_a²/S + t²(I − 1)·s_b²/I) to both sides, each source of variance with its own degrees of freedom (Howe
    1974). Slightly wide, as both variances hold the residual one; it covers the true mean at least as often as it says
    from three seeds on. With one image, or values that are means over images, it is the t interval over seeds.

    Args:
        values: (seeds, images), or (seeds,).
        level: confidence level.

    Raises:
        ValueError: there are no values.
    """
    table = np.asarray(values, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if not table.size:
        raise ValueError("Cannot compute an interval of no values: expected one per seed at least.")
    seeds = table.shape[0]
    if not np.isfinite(table).all():
        return Interval(math.nan, math.nan, math.nan, seeds)
    mean = math.fsum(table.ravel()) / table.size
    if seeds < 2:
        return Interval(mean, math.nan, math.nan, seeds)
    errors = [
        (math.sqrt(float(np.var(table.mean(1 - axis), ddof=1)) / n), n - 1)
        for axis, n in enumerate(table.shape)
        if n > 1
    ]
    if math.hypot(*(error for error, _ in errors)) <= max(_ROUNDING, 4 * np.finfo(float).eps * abs(mean)):
        return Interval(mean, mean, mean, seeds, float(abs(mean) <= _ROUNDING))  # all values are equal

    def reach(tail: float) -> float:
        return math.hypot(*(float(stats.t.isf(tail / 2, freedom)) * error for error, freedom in errors))

    width = reach(1 - level)
    return Interval(mean, mean - width, mean + width, seeds, _p_value(reach, abs(mean)))


def _p_value(reach: Callable[[float], float], distance: float) -> float:
    """The tail probability whose interval just reaches 0."""
    smallest = 1e-12
    if distance == 0:
        return 1.0
    if reach(smallest) <= distance:
        return smallest
    return float(optimize.brentq(lambda tail: reach(tail) - distance, smallest, 1.0))


def bootstrap_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean of independent values with the percentile interval of the means of 10,000 seeded resamples.

    For many values, such as a score per image. It is too narrow for few: of 3 normal values it covers the true mean in
    about 3 of 4 cases, which is why differences over seeds use `crossed_interval`.

    Raises:
        ValueError: there are no values.
    """
    sample = np.sort(np.asarray(values, dtype=np.float64))  # the order of values must not matter
    if not sample.size:
        raise ValueError("Cannot compute an interval of no values: expected one at least.")
    if not np.isfinite(sample).all():
        return Interval(math.nan, math.nan, math.nan, sample.size)
    if sample.size < 2:
        return Interval(float(sample[0]), math.nan, math.nan, 1)
    if sample[0] == sample[-1]:
        return Interval(float(sample[0]), float(sample[0]), float(sample[0]), sample.size)
    result = stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = result.confidence_interval
    return Interval(float(sample.mean()), float(low), float(high), sample.size)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979): those below 0.05 hold together with a 5 % chance of any error.

    NaN stays NaN and does not count as a comparison.
    """
    ranked = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(ranked):
        largest = max(largest, min(1.0, (len(ranked) - rank) * p))
        adjusted[place] = largest
    return adjusted


def log_ratios(
    numerators: Mapping[int, NDArray[np.float64]], denominators: Mapping[int, NDArray[np.float64]]
) -> dict[int, NDArray[np.float64]]:
    """log(numerator / denominator), image by image, for every seed that both have.

    Args:
        numerators: seed -> positive values (images,).
        denominators: likewise, of the same images.

    Returns:
        seed -> log ratios; not finite where a value is not positive and finite.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            seed: np.log(numerators[seed]) - np.log(denominators[seed])
            for seed in sorted(set(numerators) & set(denominators))
            if np.shape(numerators[seed]) == np.shape(denominators[seed])
        }


def interval_over_seeds(by_seed: Mapping[int, NDArray[np.float64]]) -> Interval:
    """`crossed_interval` of values (images,) per seed; of their means, if seeds have different numbers of images."""
    rows = [np.atleast_1d(by_seed[seed]) for seed in sorted(by_seed)]
    if len({len(row) for row in rows}) == 1:
        return crossed_interval(np.stack(rows))
    return crossed_interval([row.mean() for row in rows])


def _exp(value: float) -> float:
    return math.exp(value) if not value >= 700 else math.inf
