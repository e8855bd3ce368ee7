"""Figures of points: what factors do, and quality against time and state."""

from __future__ import annotations

import math
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.report import style
from experiments.report.curves import RELATIVE, costs
from experiments.report.effects import Effect, reads
from experiments.report.records import Run, Variant
from experiments.report.tables import over_seeds

COSTS = (("seconds", 1e-3, "time of one forward pass (ms)"), ("state_size", 1, "state: numbers carried between tokens"))


def effects(run: Run, found: list[Effect], path: Path) -> bool:
    """A row a factor's value and size: the ratio of errors with its interval, and every pair of rows as a dot."""
    found = [e for e in found if math.isfinite(e.ratio.mean) and e.ratio.mean > 0]
    if not found:
        return False
    canvas = Figure(figsize=(7.2, 1.5 + 0.25 * len(found)), layout="constrained")
    axes = canvas.subplots()
    names = []
    for place, effect in enumerate(found):
        first = place == 0 or (effect.factor, effect.value) != (found[place - 1].factor, found[place - 1].value)
        names.append(fill((f"{effect.above} ÷ {effect.below}, " if first else "") + f"{effect.size} px", 42))
        for pair in (p for p in effect.pairs if math.isfinite(p.ratio.mean) and p.ratio.mean > 0):
            axes.plot(pair.ratio.mean, place, **_look(run, pair.above, effect.field), markersize=4.5, alpha=0.75)
        color = "black" if effect.marked else "#999999"
        axes.plot([effect.ratio.low, effect.ratio.high], [place, place], color=color, linewidth=2.5, zorder=3)
        axes.plot(effect.ratio.mean, place, "|", color=color, markersize=13, markeredgewidth=2.5, zorder=3)
        if first and place:
            axes.axhline(place - 0.5, color="#dddddd", linewidth=0.8)
    axes.axvline(1, color=style.GRAY, linewidth=1)
    ticks = {"yticks": range(len(found)), "yticklabels": names, "ylim": (len(found) - 0.5, -0.5)}
    axes.set(xscale="log", xlabel="ratio of errors to the teacher; 1: no effect", **ticks)
    style.plain_log(axes, "x")
    axes.grid(axis="y", visible=False)
    _legend(canvas, run)
    style.save(canvas, path)
    return True


def pareto(run: Run, path: Path) -> bool:
    """Error at the largest size against time and state of a forward pass; the line joins those that nothing beats."""
    size = max((s for v in run.variants if not v.untouched for c in run.done(v.name) for s in c.fidelity), default=0)
    plans = [(plan, found) for plan in COSTS if (found := _against_cost(run, size, plan[0]))]
    if not plans:
        return False
    canvas, panels = style.panels(len(plans), 4.6, 4.6, sharex=False)
    for axes, ((_, scale, label), found) in zip(panels, plans, strict=True):
        for variant, cost, error in found:
            axes.plot(cost / scale, error, **_look(run, variant), markersize=7, alpha=0.85)
        _front(axes, [(cost / scale, error) for _, cost, error in found])
        axes.set(xscale="log", yscale="log", xlabel=label)
        style.plain_log(axes, "x")
    style.plain_log(panels[0])
    panels[0].set_ylabel(f"{RELATIVE}, {size} px", fontsize=8)
    _legend(canvas, run)
    style.save(canvas, path)
    return True


def _against_cost(run: Run, size: int, attribute: str) -> list[tuple[Variant, float, float]]:
    """Variant, cost at the largest size timed, and error, of the trained rows that have both."""
    found = []
    for variant in (v for v in run.variants if not v.untouched):
        error, spent = over_seeds(run, variant, size, "relative_error_to_teacher"), costs(run, variant, attribute)
        if error is not None and spent and error.mean > 0 and math.isfinite(error.mean):
            found.append((variant, spent[-1][1].mean, error.mean))
    return found


def _look(run: Run, variant: Variant, factor: str = "") -> dict[str, Any]:
    """Color by mixer, marker by causality, hollow if not normalized; a factor that is compared is not shown."""
    color = style.by_mixer(run)[str(variant.mixer)]
    marker = "o" if factor == "causality" else style.MARKERS.get(variant.causality or "", "o")
    hollow = variant.normalize is False and factor != "normalize"
    return {"color": color, "marker": marker, "linestyle": "", "markerfacecolor": "white" if hollow else color}


def _legend(canvas: Figure, run: Run) -> None:
    """What colors, markers and hollow markers are."""
    marks: dict[str, Any] = {"color": style.GRAY, "linestyle": ""}
    colors = [(run.mixers[mixer], color) for mixer, color in style.by_mixer(run).items()]
    keys = [Line2D([], [], color=color, marker="o", linestyle="", label=name) for name, color in colors]
    orders = {v.causality for v in run.variants if not v.untouched}
    keys += [Line2D([], [], marker=m, label=reads(run, o), **marks) for o, m in style.MARKERS.items() if o in orders]
    keys += [Line2D([], [], marker="o", markerfacecolor="white", label="not normalized", **marks)]
    canvas.legend(handles=keys, loc="outside lower center", ncols=5)


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other point beats in cost and error both, by cost."""
    best, found = math.inf, []
    for cost, error in sorted(points):
        if error < best:
            best = error
            found.append((cost, error))
    return found


def _front(axes: Axes, points: list[tuple[float, float]]) -> None:
    joined = front(points)
    axes.step([c for c, _ in joined], [e for _, e in joined], where="post", color="#bbbbbb", linewidth=1.2, zorder=0)
