"""Seeds as the unit: paired differences, and how far they may be chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
EXACT = 6
"""Up to so many values, all resamples are listed instead of drawn: 6⁶ are 46,656."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its bootstrap interval.

    With three seeds the interval reaches from the smallest to the largest value: it excludes a number exactly where
    all seeds are on one side of it. With one it is that value alone and excludes nothing.
    """

    mean: float
    low: float
    high: float
    seeds: int

    def excludes(self, value: float) -> bool:
        """Whether a difference from `value` may be marked: two seeds at least, and the interval leaves it out."""
        return self.seeds > 1 and (self.low > value or self.high < value)

    def exp(self) -> Interval:
        """Of log ratios: the ratios, whose center is a geometric mean."""
        return Interval(_exp(self.mean), _exp(self.low), _exp(self.high), self.seeds)


def bootstrap(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean and the percentile interval of the means of resamples with replacement (Efron 1979).

    Args:
        values: one a seed; the order does not matter.
        level: the share of resamples inside.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("A mean needs a value at least, got none.")
    if not all(math.isfinite(v) for v in values):
        return Interval(math.nan, math.nan, math.nan, len(values))
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    count = len(ordered)
    if count <= EXACT:
        chosen = np.array(list(product(range(count), repeat=count)))
    else:
        chosen = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    means = ordered[chosen].mean(axis=1)
    outside = (1 - level) / 2
    low, high = np.quantile(means, (outside, 1 - outside), method="inverted_cdf")
    return Interval(float(ordered.mean()), float(low), float(high), count)


def log_ratios(above: Mapping[int, float], below: Mapping[int, float]) -> dict[int, float]:
    """log(above / below) for every seed that both have; not finite where one is not positive."""
    return {seed: _log(above[seed]) - _log(below[seed]) for seed in above if seed in below}


def mean_by_seed(pairs: Sequence[Mapping[int, float]]) -> list[float]:
    """The mean over pairs of rows for every seed that all of them have, so that seeds are compared alike."""
    if not pairs:
        return []
    shared = set(pairs[0]).intersection(*pairs[1:])
    return [math.fsum(pair[seed] for pair in pairs) / len(pairs) for seed in sorted(shared)]


def _log(value: float) -> float:
    if math.isnan(value) or value < 0:
        return math.nan
    return math.log(value) if value else -math.inf


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
