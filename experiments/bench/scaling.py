"""How time grows with size: the exponent p of time ~ size^p."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from experiments.bench.benchmark import Measurement

MIN_SIZE = 4096
"""The smallest size that exponents are fitted to; below, fixed costs dominate."""


def scaling_exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Fit the exponent p of time ~ size^p: the least-squares slope on logarithmic axes.

    Args:
        points: (size, time).

    Returns:
        The exponent, or None for fewer than two points.
    """
    if len(points) < 2:
        return None
    xs = [math.log(size) for size, _ in points]
    ys = [math.log(time) for _, time in points]
    mean_x = statistics.fmean(xs)
    mean_y = statistics.fmean(ys)
    variance = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / variance


def scaling_exponents(measurements: Sequence[Measurement], min_size: int = MIN_SIZE) -> dict[tuple[str, str], float]:
    """Fit the exponent of every implementation that was measured at two sizes or more from `min_size` on.

    Returns:
        (benchmark, implementation) -> exponent.
    """
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for m in measurements:
        if m.time is not None and m.size >= min_size:
            points.setdefault((m.benchmark, m.implementation), []).append((m.size, m.time.median))
    exponents = {key: scaling_exponent(sizes_and_times) for key, sizes_and_times in points.items()}
    return {key: exponent for key, exponent in exponents.items() if exponent is not None}
