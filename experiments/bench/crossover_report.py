"""The results of a crossover measurement as a JSON file, a terminal table and a figure."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.console import Console
from rich.table import Table

from experiments.bench.crossover import MIN_TOKENS, CrossoverCurve, CrossoverResult
from experiments.core.figures import PALETTE, RC
from experiments.core.files import write_json


def save_crossovers(result: CrossoverResult, directory: Path) -> Path:
    """Write `crossover.json` into a folder; returns its path."""
    curves = [{**asdict(curve), "crossover": curve.crossover, "fast_from": curve.fast_from} for curve in result.curves]
    path = directory / "crossover.json"
    write_json(path, {"machine": result.machine, "min_tokens": result.min_tokens, "curves": curves})
    return path


def print_crossovers(result: CrossoverResult, console: Console) -> None:
    """Print a row per mixer and site, why some were not measured further, and the lines to copy; fits 80 columns."""
    table = Table("mixer", "sites", "wins from", "first", "last", caption="first, last: time / softmax's time")
    for curve in result.curves:
        table.add_row(*_table_row(curve))
    console.print(table)
    notes: dict[str, list[str]] = {}
    for curve in result.curves:
        if curve.note:
            notes.setdefault(curve.note, []).append(f"{curve.mixer} ({curve.site})")
    for note, curves in notes.items():
        console.print(f"{', '.join(curves)}: {note}", soft_wrap=True, highlight=False, markup=False)
    m = result.machine
    threads = f", threads: {m['threads']}" if m["threads"] else ""
    console.print(f"{m['device']}{threads}, torch {m['torch']}, {m['dtype']}, batch {m['batch']}. To copy:\n")
    for name in result.min_tokens:
        for line in _lines_to_copy(result, name):
            console.print(line, soft_wrap=True, highlight=False, markup=False)


def _table_row(curve: CrossoverCurve) -> tuple[str, ...]:
    crossover = curve.crossover
    wins_from = "–"
    if crossover is not None:
        wins_from = f"{'≤ ' if crossover == MIN_TOKENS else ''}{crossover:,.0f}"
    first = "–"
    last = "–"
    if len(curve.points) > 1:
        first, *_, last = (f"{point.ratio:.2f} at {point.tokens:,}" for point in curve.points)
    return curve.mixer, f"{curve.site.dim} × {curve.site.heads}", wins_from, first, last


def _lines_to_copy(result: CrossoverResult, name: str) -> list[str]:
    threshold = result.min_tokens[name]
    if threshold is not None:
        return [f'MixerAdapter.build(pipe, "{name}", min_tokens={threshold})']
    losing = [curve for curve in result.curves if curve.mixer == name and curve.fast_from is None]
    return [
        f"# {name}: no win up to {curve.points[-1].tokens if curve.points else 0:,} tokens, {curve.site}"
        for curve in losing
    ]


def plot_crossovers(result: CrossoverResult, path: Path) -> None:
    """Plot time against tokens, a panel per mixer: stock dashed, mounted solid, a ring where they cross."""
    mixers = list(result.min_tokens)
    columns = min(3, len(mixers))
    rows = -(-len(mixers) // columns)
    with rc_context(RC):
        figure = Figure(figsize=(3.6 * columns + 0.6, 3.0 * rows + 0.5), layout="constrained")
        figure.suptitle("Dashed: softmax attention; solid: with the mixer", fontsize=9)
        for number, name in enumerate(mixers):
            axes = figure.add_subplot(rows, columns, number + 1)
            axes.set(xscale="log", yscale="log", title=name, xlabel="tokens", ylabel="ms a call")
            curves = [curve for curve in result.curves if curve.mixer == name]
            for curve, color, label_below in zip(curves, cycle(PALETTE), cycle((True, False))):
                _plot_curve(axes, curve, color, label_below)
            axes.xaxis.set_major_locator(LogLocator(base=4))
            axes.xaxis.set_minor_locator(NullLocator())
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
            if curves[0].points:
                axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Software": None})


def _plot_curve(axes: Axes, curve: CrossoverCurve, color: str, label_below: bool) -> None:
    tokens = [point.tokens for point in curve.points]
    stock = [1e3 * point.stock.median for point in curve.points]
    mounted = [1e3 * point.mounted.median for point in curve.points]
    low = [1e3 * point.mounted.low for point in curve.points]
    high = [1e3 * point.mounted.high for point in curve.points]
    axes.plot(tokens, stock, color=color, linestyle="--", alpha=0.6)
    axes.plot(tokens, mounted, color=color, label=f"{curve.site}")
    axes.fill_between(tokens, low, high, color=color, alpha=0.15, linewidth=0)
    crossover = curve.crossover
    if crossover is None:
        return
    height = math.exp(np.interp(math.log(crossover), np.log(tokens), np.log(mounted)))
    axes.plot([crossover], [height], "o", color=color, fillstyle="none", markersize=9)
    axes.annotate(
        f"{crossover:,.0f}",
        (crossover, height),
        xytext=(6, -11) if label_below else (-6, 5),
        ha="left" if label_below else "right",
        textcoords="offset points",
        color=color,
    )
