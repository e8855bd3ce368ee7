"""Plots of measurements: time against size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments.bench.benchmark import Measurement
from experiments.core.figures import PALETTE, RC


def plot_times(measurements: Sequence[Measurement], path: Path) -> None:
    """Plot one benchmark: a line per implementation between its quartiles, and the roofline dotted."""
    with rc_context(RC):
        figure = Figure(figsize=(5.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xscale="log", yscale="log", xlabel="size", ylabel="ms a call")
        axes.set_title(measurements[0].benchmark, fontsize=8)
        names = dict.fromkeys(m.implementation for m in measurements)
        for name, color in zip(names, cycle(PALETTE)):
            points = [(m.size, m.time) for m in measurements if m.implementation == name and m.time is not None]
            if not points:
                continue
            sizes = [size for size, _ in points]
            axes.plot(sizes, [1e3 * t.median for _, t in points], "o-", color=color, label=name, markersize=3)
            low = [1e3 * t.low for _, t in points]
            high = [1e3 * t.high for _, t in points]
            axes.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)
        roofline = {m.size: m.roofline_seconds for m in measurements if m.roofline_seconds is not None}
        if roofline:
            axes.plot(list(roofline), [1e3 * s for s in roofline.values()], ":", color="gray", label="roofline")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
        figure.savefig(path, dpi=130, metadata={"Software": None})
