"""The number of tokens from which a mixer is at least as fast as the softmax attention that it replaces.

One attention layer, stock and with the mixer mounted, is timed at 64, 128, 256, … tokens. From where the ratio
mounted / stock stays at 1 or below, `MixerAdapter.build(..., min_tokens=N)` is worthwhile.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.bench.attention_layer import (
    BATCH,
    STOCK,
    AttentionLayerTimer,
    MixerCannotRun,
    SiteShape,
    TimeIsUp,
    choose_site_shapes,
)
from experiments.bench.config import DTYPES
from experiments.bench.machine import describe_machine
from experiments.core.devices import check_device
from experiments.core.progress import ProgressCallback, ignore_progress
from experiments.core.timing import Clock, Quartiles
from mixers import list_mixers
from mixers.suggest import unknown_name

MIN_TOKENS = 64
"""The smallest number of tokens that is measured; the others double from here."""

TimeLayers = Callable[[SiteShape, int, Sequence[str]], dict[str, list[float]]]
"""Takes (site shape, tokens, mixers) and returns seconds per call, one value per turn, by mixer and for `STOCK`."""


@dataclass(frozen=True)
class CrossoverPoint:
    """One measurement.

    Attributes:
        tokens: number of tokens.
        stock: seconds per call of softmax attention.
        mounted: seconds per call with the mixer.
        ratio: mounted / stock, the median over turns, so that slow moments of the machine cancel.
    """

    tokens: int
    stock: Quartiles
    mounted: Quartiles
    ratio: float


@dataclass(frozen=True)
class CrossoverCurve:
    """A mixer at sites of one shape.

    Attributes:
        mixer: its name.
        site: the shape of the site.
        points: the measurements, tokens increasing.
        note: why it was not measured at more tokens; None if it was.
    """

    mixer: str
    site: SiteShape
    points: tuple[CrossoverPoint, ...] = ()
    note: str | None = None

    @property
    def ratios(self) -> list[tuple[int, float]]:
        """(tokens, mounted / stock) of every measurement."""
        return [(point.tokens, point.ratio) for point in self.points]

    @property
    def crossover(self) -> float | None:
        """The number of tokens at which the curve crosses 1; see `find_crossover`."""
        return find_crossover(self.ratios)

    @property
    def fast_from(self) -> int | None:
        """The crossover, rounded up to a measured number of tokens; None if there is none."""
        start = _index_after_last_loss(self.ratios)
        return self.points[start].tokens if start < len(self.points) else None


@dataclass(frozen=True)
class CrossoverResult:
    """All curves, and the machine that they were measured on."""

    machine: dict[str, Any]
    curves: tuple[CrossoverCurve, ...] = field(default_factory=tuple)

    @property
    def min_tokens(self) -> dict[str, int | None]:
        """For each mixer, the threshold for all sites: the largest of them; None if it does not win at one of them."""
        thresholds: dict[str, list[int | None]] = {}
        for curve in self.curves:
            thresholds.setdefault(curve.mixer, []).append(curve.fast_from)
        return {
            name: None if None in values else max(value for value in values if value is not None)
            for name, values in thresholds.items()
        }


def find_crossover(ratios: Sequence[tuple[int, float]]) -> float | None:
    """Find the number of tokens from which a mixer stays at least as fast.

    A single ratio above 1 counts, noise or not: the number errs towards softmax attention.

    Args:
        ratios: (tokens, time mounted / time stock), tokens increasing.

    Returns:
        Where the line between the last measured ratio above 1 and the next one crosses 1, straight on logarithmic axes;
        the first number of tokens if no ratio is above 1; None if the last one is, or nothing was measured.
    """
    start = _index_after_last_loss(ratios)
    if start == len(ratios):
        return None
    low, above = ratios[max(start - 1, 0)]
    high, below = ratios[start]
    share = math.log(above) / (math.log(above) - math.log(below)) if start else 0.0
    return min(max(low * (high / low) ** share, low), high)


def _index_after_last_loss(ratios: Sequence[tuple[int, float]]) -> int:
    """Return the index from which on no ratio is above 1."""
    return max((i + 1 for i, (_, ratio) in enumerate(ratios) if not ratio <= 1), default=0)


def doubling_lengths(max_tokens: int) -> list[int]:
    """Return 64, 128, … up to `max_tokens`.

    Raises:
        ValueError: that is less than two lengths.
    """
    if max_tokens < 2 * MIN_TOKENS:
        raise ValueError(
            f"Cannot find a crossover with max_tokens={max_tokens}: lengths double from {MIN_TOKENS}, so pass "
            f"{2 * MIN_TOKENS} or more."
        )
    return [MIN_TOKENS << i for i in range(int(math.log2(max_tokens / MIN_TOKENS)) + 1)]


def measure_crossovers(
    pattern: str = "*",
    shapes: Sequence[SiteShape] | None = None,
    *,
    max_tokens: int = 65536,
    dtype: str = "float32",
    device: str = "cpu",
    repeats: int = 7,
    budget_seconds: float = math.inf,
    progress: ProgressCallback = ignore_progress,
) -> CrossoverResult:
    """Measure from how many tokens the mixers that match a pattern are faster, at their published defaults.

    Args:
        pattern: wildcard pattern of registered names; mixers whose cost is not linear are left out.
        shapes: of the sites; None: those of the embedded teacher.
        max_tokens: the largest number of tokens. A site is not measured beyond the first length at which softmax
            attention takes two seconds.
        dtype: of weights and tokens.
        device: "cpu" or "cuda", optionally with an index.
        repeats: number of turns that medians are taken over.
        budget_seconds: no measurement starts after this time; the curves say where they end.
        progress: called with every measurement.

    Raises:
        ValueError: no such mixer, dtype or device, or `max_tokens` is too small.

    Cost: about a minute per mixer on a CPU; forward passes of single layers with random weights.
    """
    names = list_mixers(pattern, linear=True)
    if not names:
        available = ", ".join(list_mixers(linear=True))
        raise ValueError(f"No linear mixer matches {pattern!r}: expected one of {available}.")
    if dtype not in DTYPES:
        raise ValueError(unknown_name("dtype", dtype, DTYPES))
    check_device(device)
    deadline = time.perf_counter() + budget_seconds
    timer = AttentionLayerTimer(DTYPES[dtype], device, repeats, deadline)
    shapes = shapes or choose_site_shapes()
    curves = measure_curves(
        names, shapes, doubling_lengths(max_tokens), timer, budget_seconds=budget_seconds, progress=progress
    )
    return CrossoverResult({**describe_machine(device), "dtype": dtype, "batch": BATCH}, curves)


def measure_curves(
    names: Sequence[str],
    shapes: Sequence[SiteShape],
    lengths: Sequence[int],
    time_layers: TimeLayers,
    *,
    slow_seconds: float = 2.0,
    budget_seconds: float = math.inf,
    progress: ProgressCallback = ignore_progress,
    clock: Clock = time.perf_counter,
) -> tuple[CrossoverCurve, ...]:
    """Measure every mixer at every shape, with increasing numbers of tokens.

    Args:
        names: of the mixers.
        shapes: of the sites.
        lengths: numbers of tokens, increasing.
        time_layers: times the layers; raises TimeIsUp if the time left does not suffice.
        slow_seconds: a shape is finished once softmax attention takes this long; a mixer, once it is slower than
            softmax attention and takes this long.
        budget_seconds: no measurement starts after this time. Shapes that it leaves no time for have no points.
        progress: called with every measurement.
        clock: source of the time, in seconds.

    Returns:
        Curves by mixer, then by shape. A mixer that cannot be built or run has a note that says so.
    """
    curves = {(name, shape): CrossoverCurve(name, shape) for name in names for shape in shapes}
    total = len(shapes) * len(lengths)
    deadline = clock() + budget_seconds
    for row, shape in enumerate(shapes):
        running = list(names)
        for step, tokens in enumerate(lengths):
            progress(f"{shape}: {tokens:,} tokens", row * len(lengths) + step, total)
            try:
                if clock() >= deadline:
                    raise TimeIsUp
                times = _time_runnable(time_layers, shape, tokens, running, curves)
            except TimeIsUp:
                note = f"not measured from {tokens:,} tokens on: the time budget is spent"
                unmeasured = (name for name in running if curves[name, shape].note is None)
                curves |= {(name, shape): replace(curves[name, shape], note=note) for name in unmeasured}
                break
            for name in times.keys() & set(running):
                curves[name, shape] = _extend(curves[name, shape], tokens, times[STOCK], times[name], slow_seconds)
            running = [name for name in running if name in times and curves[name, shape].note is None]
            if not running or statistics.median(times[STOCK]) >= slow_seconds:
                break
    progress("measured", total, total)
    return tuple(curves.values())


def _time_runnable(
    time_layers: TimeLayers,
    shape: SiteShape,
    tokens: int,
    names: Sequence[str],
    curves: dict[tuple[str, SiteShape], CrossoverCurve],
) -> dict[str, list[float]]:
    """Return the times of the mixers that can run; the others get a note."""
    names = list(names)
    while names:
        try:
            return time_layers(shape, tokens, names)
        except MixerCannotRun as error:
            names.remove(error.mixer)
            key = error.mixer, shape
            curves[key] = replace(curves[key], note=f"cannot run with {tokens:,} tokens: {error}")
    return {}


def _extend(
    curve: CrossoverCurve, tokens: int, stock: list[float], mounted: list[float], slow_seconds: float
) -> CrossoverCurve:
    """Add a point to a curve, and a note if the mixer is too slow to go on."""
    ratio = statistics.median(m / s for m, s in zip(mounted, stock, strict=True))
    point = CrossoverPoint(tokens, Quartiles.from_times(stock), Quartiles.from_times(mounted), ratio)
    note = None
    if ratio > 1 and point.mounted.median >= slow_seconds:
        note = f"slower, and {point.mounted.median:.1f} s a call with {tokens:,} tokens: not measured beyond"
    return replace(curve, points=(*curve.points, point), note=note)
