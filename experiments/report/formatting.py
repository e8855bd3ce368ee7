"""Numbers as readers see them."""

from __future__ import annotations

import math

from experiments.core.statistics import Interval


def format_number(value: float) -> str:
    """Format with three significant digits, scientific only for very small and large numbers."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "not finite"
    if not 1e-4 <= abs(value) < 1e4:
        return f"{value:.2e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def format_ratio(ratio: Interval) -> str:
    """Return "3.1× [2.8, 3.5]"; without brackets if a single seed gives no interval."""
    if not math.isfinite(ratio.mean):
        return "a ratio that is not finite"
    bounds = f" [{format_number(ratio.low)}, {format_number(ratio.high)}]" if ratio.has_bounds else ""
    return f"{format_number(ratio.mean)}×{bounds}"
