"""Figures of points: effects of factors, and quality against time and state."""

from __future__ import annotations

import math
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.ablation.description import VariantDescription
from experiments.metrics.fidelity import RELATIVE_ERROR
from experiments.report import style
from experiments.report.effects import Effect, readable
from experiments.report.errors import METRIC
from experiments.report.line_plots import costs_by_tokens
from experiments.report.run_files import RunRecord
from experiments.report.tables import summarize_fidelity

COSTS = (("seconds", 1e-3, "time of one forward pass (ms)"), ("state_size", 1, "state: numbers carried between tokens"))


def plot_effects(run: RunRecord, effects: list[Effect], path: Path) -> bool:
    """Draw a line for each factor's value and size: the ratio of errors with its interval, and a marker per pair."""
    effects = [e for e in effects if math.isfinite(e.ratio.mean) and e.ratio.mean > 0]
    if not effects:
        return False
    canvas = Figure(figsize=(7.2, 1.5 + 0.25 * len(effects)), layout="constrained")
    axes = canvas.subplots()
    names = []
    for position, effect in enumerate(effects):
        first = position == 0 or effect.factor != effects[position - 1].factor
        names.append(fill((f"{effect.name}, " if first else "") + f"{effect.size} px", 42))
        for pair in (p for p in effect.pairs if math.isfinite(p.ratio.mean) and p.ratio.mean > 0):
            look = _marker(run, pair.above, effect.factor.field)
            axes.plot(pair.ratio.mean, position, **look, markersize=4.5, alpha=0.75)
        color = "black" if effect.significant else "#999999"
        if effect.ratio.has_bounds:
            axes.plot([effect.ratio.low, effect.ratio.high], [position, position], color=color, linewidth=2.5, zorder=3)
        axes.plot(effect.ratio.mean, position, "|", color=color, markersize=13, markeredgewidth=2.5, zorder=3)
        if first and position:
            axes.axhline(position - 0.5, color="#dddddd", linewidth=0.8)
    axes.axvline(1, color=style.GRAY, linewidth=1)
    axes.set(xscale="log", xlabel="ratio of errors to the teacher; 1: no effect", ylim=(len(effects) - 0.5, -0.5))
    axes.set_yticks(range(len(effects)), names)
    style.use_plain_log_labels(axes, "x")
    axes.grid(axis="y", visible=False)
    _add_legend(canvas, run)
    style.save_figure(canvas, path)
    return True


def plot_pareto(run: RunRecord, path: Path) -> bool:
    """Draw error at the largest size against time and state of a forward pass; steps join the Pareto-optimal rows."""
    size = max((s for v in run.trained for c in run.done(v.name) for s in c.fidelity), default=0)
    panels = [(cost, points) for cost in COSTS if (points := _error_against_cost(run, size, cost[0]))]
    if not panels:
        return False
    canvas, all_axes = style.make_panels(len(panels), 4.6, 4.6, sharex=False)
    for axes, ((_, scale, label), points) in zip(all_axes, panels, strict=True):
        for variant, cost, error in points:
            axes.plot(cost / scale, error, **_marker(run, variant), markersize=7, alpha=0.85)
        _draw_front(axes, [(cost / scale, error) for _, cost, error in points])
        axes.set(xscale="log", yscale="log", xlabel=label)
        style.use_plain_log_labels(axes, "x")
    style.use_plain_log_labels(all_axes[0])
    all_axes[0].set_ylabel(f"{RELATIVE_ERROR}, {size} px", fontsize=8)
    _add_legend(canvas, run)
    style.save_figure(canvas, path)
    return True


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other point beats in both cost and error, by cost."""
    lowest = math.inf
    front = []
    for cost, error in sorted(points):
        if error < lowest:
            lowest = error
            front.append((cost, error))
    return front


def _error_against_cost(run: RunRecord, size: int, quantity: str) -> list[tuple[VariantDescription, float, float]]:
    """Variant, cost at the largest size timed, and error, of the trained rows that have both."""
    points = []
    for variant in run.trained:
        error = summarize_fidelity(run, variant, size, METRIC)
        costs = costs_by_tokens(run, variant, quantity)
        if error is not None and costs and error.mean > 0 and math.isfinite(error.mean) and costs[-1][1].mean > 0:
            points.append((variant, costs[-1][1].mean, error.mean))
    return points


def _marker(run: RunRecord, variant: VariantDescription, compared: str = "") -> dict[str, Any]:
    """Color by mixer, marker by causality, hollow unless normalized; the factor that is compared does not show."""
    color = style.color_by_mixer(run)[variant.mixer]
    hollow = variant.normalization != "normalized" and compared != "normalization"
    return {
        "color": color,
        "marker": "o" if compared == "causality" else style.MARKERS.get(variant.causality, "o"),
        "linestyle": "",
        "markerfacecolor": "white" if hollow else color,
    }


def _add_legend(canvas: Figure, run: RunRecord) -> None:
    """Explain colors, markers and hollow markers."""
    gray: dict[str, Any] = {"color": style.GRAY, "linestyle": ""}
    handles = [
        Line2D([], [], color=color, marker="o", linestyle="", label=run.mixer_labels[mixer])
        for mixer, color in style.color_by_mixer(run).items()
    ]
    orders = {variant.causality for variant in run.trained}
    handles += [
        Line2D([], [], marker=marker, label=readable(run, order), **gray)
        for order, marker in style.MARKERS.items()
        if order in orders
    ]
    handles += [Line2D([], [], marker="o", markerfacecolor="white", label="not normalized", **gray)]
    canvas.legend(handles=handles, loc="outside lower center", ncols=5)


def _draw_front(axes: Axes, points: list[tuple[float, float]]) -> None:
    front = pareto_front(points)
    costs = [cost for cost, _ in front]
    errors = [error for _, error in front]
    axes.step(costs, errors, where="post", color="#bbbbbb", linewidth=1.2, zorder=0)
