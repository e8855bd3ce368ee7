"""From how many tokens on a mixer is at least as fast as the softmax attention it stands in for.

ladder 64, 128, 256, …  ->  one attention layer, stock and mounted, timed in turns  ->  ratio mounted / stock
ratio ≤ 1 from here on  ->  `MixerAdapter.build(..., min_tokens=N)`
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.console import Console
from rich.table import Table
from torch import nn

from experiments.bench.timing import BATCH, STOCK, Bench, CannotRun, Kind, machine
from experiments.core.files import write_json
from experiments.core.timing import Quartiles
from experiments.report import style
from experiments.teacher import load
from mixers import list_mixers
from unet_adapters.sites import all_sites

FIRST = 64  # tokens; the ladder doubles from here

PROFILES: dict[str, tuple[Kind, ...]] = {
    "sd15": (Kind(320, 8), Kind(640, 8), Kind(1280, 8)),
    "sd21": (Kind(320, 5), Kind(640, 10), Kind(1280, 20)),
    "sdxl": (Kind(640, 10), Kind(1280, 20)),
}
EMBEDDED = "embedded"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}

# (kind, tokens, names) -> seconds of one call by name, STOCK among them, one number a turn.
Measure = Callable[[Kind, int, Sequence[str]], dict[str, list[float]]]
Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Point:
    """One measurement. `ratio`: mounted / stock, the median over turns, so that slow moments of a machine cancel."""

    tokens: int
    stock: Quartiles
    mounted: Quartiles
    ratio: float


@dataclass(frozen=True)
class Curve:
    """A mixer at sites of one kind. `note` says why it was not measured further, where it was not."""

    mixer: str
    kind: Kind
    points: tuple[Point, ...] = ()
    note: str | None = None

    @property
    def ratios(self) -> list[tuple[int, float]]:
        """(tokens, mounted / stock)."""
        return [(point.tokens, point.ratio) for point in self.points]

    @property
    def crossover(self) -> float | None:
        """See `find_crossover`."""
        return find_crossover(self.ratios)

    @property
    def fast_from(self) -> int | None:
        """The crossover, rounded up to a measured number of tokens."""
        start = _start(self.ratios)
        return self.points[start].tokens if start < len(self.points) else None


@dataclass(frozen=True)
class Crossovers:
    """All that was measured, and the machine."""

    machine: dict[str, Any]
    curves: tuple[Curve, ...] = field(default_factory=tuple)

    @property
    def min_tokens(self) -> dict[str, int | None]:
        """For each mixer, the largest number over the kinds; None where it does not win at one of them."""
        names = dict.fromkeys(curve.mixer for curve in self.curves)
        found = {name: [c.fast_from for c in self.curves if c.mixer == name] for name in names}
        return {n: None if None in f else max(t for t in f if t is not None) for n, f in found.items()}


def find_crossover(ratios: Sequence[tuple[int, float]]) -> float | None:
    """The number of tokens from which a mixer stays at least as fast.

    Args:
        ratios: (tokens, time mounted / time stock), tokens rising.

    Returns:
        Where the line between the last measured ratio above 1 and the next one crosses 1, straight in log-log axes.
        The first number of tokens if no ratio is above 1; None if the last one is, or nothing was measured. A single
        ratio above 1 counts, noise or not: the number errs towards softmax attention.
    """
    start = _start(ratios)
    if start == len(ratios):
        return None
    (low, above), (high, below) = ratios[max(start - 1, 0)], ratios[start]
    share = math.log(above) / (math.log(above) - math.log(below)) if start else 0.0
    return min(max(low * (high / low) ** share, low), high)


def _start(ratios: Sequence[tuple[int, float]]) -> int:
    """The index from which on no ratio is above 1."""
    return max((i + 1 for i, (_, ratio) in enumerate(ratios) if not ratio <= 1), default=0)


def ladder(max_tokens: int) -> list[int]:
    """64, 128, … up to `max_tokens`.

    Raises:
        ValueError: not even two steps.
    """
    if max_tokens < 2 * FIRST:
        raise ValueError(
            f"max_tokens={max_tokens}: the measurement doubles from {FIRST} tokens, so give {2 * FIRST} up."
        )
    return [FIRST << i for i in range(int(math.log2(max_tokens / FIRST)) + 1)]


def kinds_of(unet: nn.Module) -> tuple[Kind, ...]:
    """The kinds of sites of a UNet, narrow ones first."""
    return tuple(sorted({Kind(site.dim, site.heads) for site in all_sites(unet)}))


def choose_kinds(profile: str = EMBEDDED, dim: int | None = None, heads: int | None = None) -> tuple[Kind, ...]:
    """The kinds of sites of `embedded` or of one of `PROFILES`; or, where both are given, of this dim and heads.

    Raises:
        ValueError: no such profile, one number without the other, or heads that do not divide.
    """
    if (dim is None) != (heads is None):
        raise ValueError("A kind of site has both a dim and heads: give the other one too.")
    if dim is not None and heads is not None:
        return (Kind(dim, heads),)
    if profile == EMBEDDED:
        config = UNet2DConditionModel.load_config(str(load.EMBEDDED), subfolder="unet")
        return kinds_of(UNet2DConditionModel.from_config(config))
    if profile not in PROFILES:
        raise ValueError(f"No profile {profile!r}: expected one of {', '.join((EMBEDDED, *PROFILES))}.")
    return PROFILES[profile]


def measure_crossovers(
    pattern: str = "*",
    kinds: Sequence[Kind] | None = None,
    *,
    max_tokens: int = 65536,
    dtype: str = "float32",
    device: str = "cpu",
    repeats: int = 7,
    report: Report | None = None,
) -> Crossovers:
    """Measure where the mixers that match a pattern start to win, at their published defaults, on this machine.

    Args:
        pattern: wildcard pattern of registered names; mixers whose cost is not linear are left out.
        kinds: None for those of the embedded teacher.
        max_tokens: the ladder ends here, or after one call of softmax attention has taken two seconds.
        repeats: turns; medians are over these.
        report: called with (measurements done, their number, the one that runs).

    Raises:
        ValueError: no such mixer, dtype, device or ladder.

    Cost: a minute or so for a mixer on a CPU; forward passes only, of single layers with random weights.
    """
    names = list_mixers(pattern, linear=True)
    if not names:
        raise ValueError(f"No linear mixer matches {pattern!r}: expected {', '.join(list_mixers(linear=True))}.")
    if dtype not in DTYPES:
        raise ValueError(f"No dtype {dtype!r}: expected one of {', '.join(DTYPES)}.")
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"No device {device!r}: expected cpu or cuda.")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch finds no GPU here; use the cpu.")
    bench = Bench(DTYPES[dtype], device, repeats)
    curves = walk(names, kinds or choose_kinds(), ladder(max_tokens), bench, report=report)
    return Crossovers({**machine(device), "dtype": dtype, "batch": BATCH}, curves)


def walk(
    names: Sequence[str],
    kinds: Sequence[Kind],
    steps: Sequence[int],
    measure: Measure,
    *,
    budget: float = 2.0,
    report: Report | None = None,
) -> tuple[Curve, ...]:
    """Climb the ladder for every kind.

    A kind is done once a stock call takes `budget` seconds; a mixer, once it is slower than stock and takes as long.
    A mixer that cannot be built or run there ends with a note. Curves are by mixer, then by kind.
    """
    curves = {(name, kind): Curve(name, kind) for name in names for kind in kinds}
    for row, kind in enumerate(kinds):
        running = list(names)
        for step, tokens in enumerate(steps):
            if report:
                report(row * len(steps) + step, len(kinds) * len(steps), f"{kind}: {tokens:,} tokens")
            times = _measured(measure, kind, tokens, running, curves)
            running = [name for name in running if name in times]
            if not running:
                break
            for name in running:
                curve = curves[name, kind]
                curves[name, kind] = replace(curve, points=(*curve.points, _point(tokens, times[STOCK], times[name])))
                curves[name, kind] = replace(curves[name, kind], note=_why_stop(curves[name, kind], budget))
            running = [name for name in running if curves[name, kind].note is None]
            if not running or statistics.median(times[STOCK]) >= budget:
                break
    if report:
        report(len(kinds) * len(steps), len(kinds) * len(steps), "measured")
    return tuple(curves.values())


def _measured(
    measure: Measure, kind: Kind, tokens: int, names: Sequence[str], curves: dict[tuple[str, Kind], Curve]
) -> dict[str, list[float]]:
    """The times of those mixers that run; the others get a note."""
    names = list(names)
    while names:
        try:
            return measure(kind, tokens, names)
        except CannotRun as error:
            names.remove(error.mixer)
            key = error.mixer, kind
            curves[key] = replace(curves[key], note=f"cannot run with {tokens:,} tokens: {error}")
    return {}


def _point(tokens: int, stock: list[float], mounted: list[float]) -> Point:
    ratio = statistics.median(m / s for m, s in zip(mounted, stock, strict=True))
    return Point(tokens, Quartiles.from_times(stock), Quartiles.from_times(mounted), ratio)


def _why_stop(curve: Curve, budget: float) -> str | None:
    last = curve.points[-1]
    if last.ratio <= 1 or last.mounted.median < budget:
        return None
    return f"slower, and {last.mounted.median:.1f} s a call with {last.tokens:,} tokens: not measured beyond"


def save(result: Crossovers, directory: Path) -> Path:
    """Write `crossover.json`; returns its path."""
    curves = [{**asdict(curve), "crossover": curve.crossover, "fast_from": curve.fast_from} for curve in result.curves]
    path = directory / "crossover.json"
    write_json(path, {"machine": result.machine, "min_tokens": result.min_tokens, "curves": curves})
    return path


def show(result: Crossovers, console: Console) -> None:
    """Print a row a mixer and kind, why some were not measured, and the lines to copy; fits 80 columns."""
    table = Table("mixer", "sites", "wins from", "first", "last", caption="first, last: time / softmax's time")
    for curve in result.curves:
        found = curve.crossover
        first, *_, last = (f"{p.ratio:.2f} at {p.tokens:,}" for p in curve.points) if curve.points[1:] else ("–", "–")
        number = "–" if found is None else f"{'≤ ' if found == FIRST else ''}{found:,.0f}"
        table.add_row(curve.mixer, f"{curve.kind.dim} × {curve.kind.heads}", number, first, last)
    console.print(table)
    for curve in result.curves:
        if curve.note:
            console.print(f"{curve.mixer} ({curve.kind}): {curve.note}", soft_wrap=True, highlight=False, markup=False)
    m = result.machine
    threads = f", threads: {m['threads']}" if m["threads"] else ""
    console.print(f"{m['device']}{threads}, torch {m['torch']}, {m['dtype']}, batch {m['batch']}. To copy:\n")
    for name, least in result.min_tokens.items():
        lines = [f'MixerAdapter.build(pipe, "{name}", min_tokens={least})']
        if least is None:
            slow = [c for c in result.curves if c.mixer == name and c.fast_from is None]
            lines = [
                f"# {name}: no win up to {c.points[-1].tokens if c.points else 0:,} tokens, {c.kind}" for c in slow
            ]
        for line in lines:
            console.print(line, soft_wrap=True, highlight=False, markup=False)


def draw(result: Crossovers, path: Path) -> None:
    """Draw time against tokens, a panel a mixer: stock dashed, mounted solid, a ring where they cross."""
    mixers = list(result.min_tokens)
    columns = min(3, len(mixers))
    rows = -(-len(mixers) // columns)
    with rc_context(style.RC):
        canvas = Canvas(figsize=(3.6 * columns + 0.6, 3.0 * rows + 0.5), layout="constrained")
        canvas.suptitle("Dashed: softmax attention; solid: with the mixer", fontsize=9)
        for place, name in enumerate(mixers):
            axes = canvas.add_subplot(rows, columns, place + 1)
            axes.set(xscale="log", yscale="log", title=name, xlabel="tokens", ylabel="ms a call")
            curves = [curve for curve in result.curves if curve.mixer == name]
            for curve, color, below in zip(curves, cycle(style.PALETTE), cycle((True, False))):
                _draw_curve(axes, curve, color, below)
            axes.xaxis.set_major_locator(LogLocator(base=4))
            axes.xaxis.set_minor_locator(NullLocator())
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
            if curves[0].points:
                axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, dpi=150, metadata={"Software": None})


def _draw_curve(axes: Axes, curve: Curve, color: str, below: bool) -> None:
    tokens = [p.tokens for p in curve.points]
    axes.plot(tokens, [1e3 * p.stock.median for p in curve.points], color=color, linestyle="--", alpha=0.6)
    mounted = [1e3 * p.mounted.median for p in curve.points]
    axes.plot(tokens, mounted, color=color, label=f"{curve.kind}")
    axes.fill_between(
        tokens, [1e3 * p.mounted.low for p in curve.points], [1e3 * p.mounted.high for p in curve.points],
        color=color, alpha=0.15, linewidth=0,
    )  # fmt: skip
    found = curve.crossover
    if found is not None:
        height = math.exp(np.interp(math.log(found), np.log(tokens), np.log(mounted)))
        axes.plot([found], [height], "o", color=color, fillstyle="none", markersize=9)
        offset, side = ((6, -11), "left") if below else ((-6, 5), "right")
        axes.annotate(f"{found:,.0f}", (found, height), xytext=offset, ha=side, textcoords="offset points", color=color)
