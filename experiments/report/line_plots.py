"""Figures of lines, one panel per mixer if there are too many: metrics against a field, training loss against steps."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.ablation.description import VariantDescription
from experiments.metrics import LinePlot, Metric
from experiments.report import style
from experiments.report.run_files import RunRecord
from experiments.report.tables import SeedSummary, summarize


@dataclass(frozen=True)
class PlottedLine:
    """A line of a figure; `low` and `high` are its band, if any."""

    label: str | None
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


LinesOfVariant = Callable[[VariantDescription], list[PlottedLine]]


def plot_metric(run: RunRecord, metric: type[Metric], spec: LinePlot, path: Path) -> bool:
    """Draw a metric's line plot: one line per variant, a band over seeds. False if there is nothing to draw."""
    quantity = metric.quantity(spec.quantity)
    positions = sorted({x for variant in run.variants for x, _ in _points(run, metric, spec, variant)})
    if len(positions) < 2 and spec.shows_growth:
        return False  # one point has no growth

    def lines(variant: VariantDescription) -> list[PlottedLine]:
        if variant.untouched and quantity.perfect is not None:
            return []  # it has the perfect value by definition
        points = _points(run, metric, spec, variant)
        power = growth_exponent([(x, value.mean) for x, value in points]) if spec.shows_growth else None
        label = variant.label if power is None else f"{variant.label}: {power:.2f}"
        return _line(label, points, spec.scale)

    def decorate(axes: Axes) -> None:
        axes.set(xscale="log", yscale="log", xlabel=spec.x_label)
        style.set_ticks(axes, positions)
        if spec.marks_training_size:
            for size in run.train_sizes:
                _mark_training_size(axes, size)
        if quantity.perfect:
            axes.axhline(quantity.perfect, color=style.GRAY, linewidth=1)

    return _draw(run, lines, decorate, quantity.label, path)


def plot_training(run: RunRecord, path: Path) -> bool:
    """Draw the smoothed distillation loss against the step, one thin line per seed."""

    def lines(variant: VariantDescription) -> list[PlottedLine]:
        curves: list[PlottedLine] = []
        for cell in (c for c in run.cells if c.variant == variant.name):
            rows = [(record["step"], record.get("loss", math.nan)) for record in cell.log]
            rows = [(step, loss) for step, loss in rows if math.isfinite(loss) and loss > 0]
            if len(rows) > 1:
                label = None if curves else variant.label
                curves.append(PlottedLine(label, [r[0] for r in rows], _smooth([r[1] for r in rows]), [], []))
        return curves

    def decorate(axes: Axes) -> None:
        axes.set(yscale="log", xlabel="training step")

    return _draw(run, lines, decorate, "distillation loss (smoothed)", path, marker="", linewidth=1.2)


def growth_exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Return the slope of log y against log x over the three last points; None for fewer than two points."""
    tail = [(x, y) for x, y in points if x > 0 and y > 0][-3:]
    if len(tail) < 2:
        return None
    return float(np.polyfit(np.log([x for x, _ in tail]), np.log([y for _, y in tail]), 1)[0])


def costs_by_tokens(run: RunRecord, variant: VariantDescription, quantity: str) -> list[tuple[float, SeedSummary]]:
    """Return (tokens, mean over seeds) of a cost of one forward pass."""
    from experiments.metrics.cost import Cost

    return _points(run, Cost, LinePlot("tokens", quantity, ""), variant)


def _points(
    run: RunRecord, metric: type[Metric], spec: LinePlot, variant: VariantDescription
) -> list[tuple[float, SeedSummary]]:
    """(x, mean over seeds) of square held-out images, or of whatever rows the metric has."""
    values: dict[float, list[float]] = {}
    for cell in run.done(variant.name):
        for row in cell.rows(metric.name, metric.row):
            height = getattr(row, "height", None)
            if height != getattr(row, "width", None) or getattr(row, "split", "held_out") != "held_out":
                continue
            value = getattr(row, spec.quantity)
            if value is not None:
                values.setdefault(getattr(row, spec.x), []).append(float(value))
    return [(x, summary) for x, group in sorted(values.items()) if (summary := summarize(group))]


def _mark_training_size(axes: Axes, size: int) -> None:
    axes.axvline(size, color="#999999", linewidth=1, linestyle=":", zorder=0)
    position: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axes.annotate(
        "distilled here", (size, 1), xytext=(2, -3), va="top", fontsize=7, color="#888888", rotation=90, **position
    )


def _draw(
    run: RunRecord,
    lines: LinesOfVariant,
    decorate: Callable[[Axes], None],
    y_label: str,
    path: Path,
    **appearance: float | str,
) -> bool:
    """Draw one panel for each group of variants, with the controls behind; False if there is no line at all."""
    groups = style.group_variants(run)
    background = [(v, line) for v in style.background_rows(run) for line in lines(v)]
    panels = [(title, [(v, line) for v in variants for line in lines(v)]) for title, variants in groups]
    panels = [(title, plotted) for title, plotted in panels if plotted]
    if not panels and background:  # no row but controls is finished
        panels = [("", background)]
        background = []
    if not panels:
        return False
    single = len(panels) == 1
    same_switches = not single and all(style.differ_in_switches(variants) for _, variants in groups)
    shared = same_switches and all(line.label in (None, v.label) for _, plotted in panels for v, line in plotted)
    width, height = (6.8, 5.2) if single else (3.6, 3.0 if shared else 3.8)
    canvas, axes_list = style.make_panels(len(panels), width, height)
    handles = {}
    controls = {}
    for axes, (title, plotted) in zip(axes_list, panels, strict=True):
        for variant, line in background:
            look = appearance | style.line_style(run, variant)
            controls[line.label] = axes.plot(line.x, line.y, **look)[0]
        for variant, line in plotted:
            look = style.line_style(run, variant) | appearance
            label = line.label and line.label.removeprefix(f"{title}, ")
            handles[label] = axes.plot(line.x, line.y, label=label, **look)[0]
            if line.low:
                axes.fill_between(line.x, line.low, line.high, color=look["color"], alpha=0.15, linewidth=0)
        decorate(axes)
        axes.set_title(title)
        if not shared:
            style.add_legend(axes, 2 if single else 1)
        elif not axes.xaxis.get_tick_params()["labelbottom"]:
            axes.set_xlabel("")
    common = {label: handle for label, handle in ((handles if shared else {}) | controls).items() if label}
    if common:
        canvas.legend(common.values(), common.keys(), loc="outside lower center", ncols=3, handlelength=3)
    style.use_plain_log_labels(axes_list[0])  # all panels share its axis
    canvas.supylabel(textwrap.fill(y_label, round(12 * canvas.get_figheight())), fontsize=9)
    style.save_figure(canvas, path)
    return True


def _line(label: str, points: list[tuple[float, SeedSummary]], scale: float = 1.0) -> list[PlottedLine]:
    """What can be drawn on a log axis, with a band if there are several seeds."""
    points = [(x, v) for x, v in points if math.isfinite(v.mean) and v.mean > 0]
    if not points:
        return []
    x = [x for x, _ in points]
    y = [v.mean / scale for _, v in points]
    if all(v.seeds < 2 for _, v in points):
        return [PlottedLine(label, x, y, [], [])]
    low = [max(v.low, v.mean * 1e-3) / scale for _, v in points]
    return [PlottedLine(label, x, y, low, [v.high / scale for _, v in points])]


def _smooth(values: list[float]) -> list[float]:
    """Running mean over about a twentieth of the curve; the window shrinks at its ends."""
    half = max(1, len(values) // 40)
    return [float(np.mean(values[max(0, k - half) : k + half + 1])) for k in range(len(values))]
