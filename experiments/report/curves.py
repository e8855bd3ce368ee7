"""Figures of lines, a panel a mixer where there are too many: errors and costs against size, training against steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.report import style
from experiments.report.records import Run, Variant
from experiments.report.tables import Value, over_seeds, summarize

RELATIVE = "squared error to teacher / teacher's mean square"
RATIO = "error to truth / teacher's error to truth"


@dataclass(frozen=True)
class Line:
    """A line of a figure; `low` and `high` are its band, if any."""

    label: str | None
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


Lines = Callable[[Variant], list[Line]]


def against_size(run: Run, metric: str, path: Path) -> bool:
    """A fidelity metric against resolution, one line per variant, a band over seeds."""
    teacher = metric == "relative_error_to_teacher"

    def lines(variant: Variant) -> list[Line]:
        if variant.untouched and not teacher:
            return []  # 1 by definition
        points = [(float(size), v) for size in run.sizes if (v := over_seeds(run, variant, size, metric))]
        return _line(variant.label, points)

    def dress(axes: Axes) -> None:
        axes.set(xscale="log", yscale="log", xlabel="image side (px)")
        style.ticks(axes, run.sizes)
        axes.axvline(run.train_size, color="#999999", linewidth=1, linestyle=":", zorder=0)
        where: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate("trained here", (run.train_size, 1), xytext=(3, 2), fontsize=8, color="#666666", **where)
        if not teacher:
            axes.axhline(1, color=style.GRAY, linewidth=1)

    return _draw(run, lines, dress, RELATIVE if teacher else RATIO, path)


def cost(run: Run, attribute: str, path: Path) -> bool:
    """Time ("seconds"), memory ("peak_bytes") or operations ("flops") of one forward against the number of tokens."""
    tokens = sorted({s.tokens for c in run.cells for s in c.speed})
    if len(tokens) < 2:
        return False  # nothing grows
    scale, label = {
        "seconds": (1e-3, "time (ms)"),
        "peak_bytes": (2**20, "peak memory (MiB)"),
        "flops": (1e9, "GFLOP"),
    }[attribute]

    def lines(variant: Variant) -> list[Line]:
        points = costs(run, variant, attribute)
        power = exponent([(t, v.mean) for t, v in points])
        told = variant.label if power is None else f"{variant.label}: {power:.2f}"
        return _line(told, [(float(t), v) for t, v in points], scale)

    def dress(axes: Axes) -> None:
        axes.set(xscale="log", yscale="log", xlabel="tokens of the largest self-attention")
        style.ticks(axes, tokens)

    return _draw(run, lines, dress, f"{label} of one forward pass", path)


def training(run: Run, path: Path) -> bool:
    """Smoothed distillation loss against step, one thin line per seed."""

    def lines(variant: Variant) -> list[Line]:
        found: list[Line] = []
        for cell in (c for c in run.cells if c.variant == variant.name):
            rows = [(r["step"], r.get("loss", math.nan)) for r in cell.metrics]
            rows = [(step, loss) for step, loss in rows if math.isfinite(loss) and loss > 0]
            if len(rows) > 1:
                smooth = _smooth([r[1] for r in rows])
                found.append(Line(None if found else variant.label, [r[0] for r in rows], smooth, [], []))
        return found

    def dress(axes: Axes) -> None:
        axes.set(yscale="log", xlabel="training step")

    return _draw(run, lines, dress, "distillation loss (smoothed)", path, marker="", linewidth=1.2)


def exponent(points: list[tuple[int, float]]) -> float | None:
    """Slope of log value against log tokens over the three largest sizes; None of fewer than two."""
    tail = [(t, v) for t, v in points if t > 0 and v > 0][-3:]
    if len(tail) < 2:
        return None
    return float(np.polyfit(np.log([t for t, _ in tail]), np.log([v for _, v in tail]), 1)[0])


def costs(run: Run, variant: Variant, attribute: str) -> list[tuple[int, Value]]:
    """(tokens, value over seeds) of a cost of one forward pass."""
    found: dict[int, list[float]] = {}
    for cell in run.done(variant.name):
        for row in cell.speed:
            value = getattr(row, attribute)
            if value is not None and value > 0:
                found.setdefault(row.tokens, []).append(float(value))
    return [(t, v) for t, values in sorted(found.items()) if (v := summarize(values))]


def _draw(run: Run, lines: Lines, dress: Callable[[Axes], None], ylabel: str, path: Path, **looks: float | str) -> bool:
    """A panel a group of variants; False where there is no line at all."""
    rows = [(title, [(v, line) for v in variants for line in lines(v)]) for title, variants in style.groups(run)]
    rows = [(title, found) for title, found in rows if found]
    if not rows:
        return False
    single = len(rows) == 1
    alike = not single and all(style.by_switch(v) for title, v in style.groups(run))
    shared = alike and all(line.label in (None, v.label) for _, found in rows for v, line in found)
    canvas, panels = style.panels(len(rows), *((6.8, 5.2) if single else (3.6, 3.0 if shared else 3.8)))
    handles = {}
    for axes, (title, found) in zip(panels, rows, strict=True):
        for variant, line in found:
            look = style.line(run, variant) | looks
            told = line.label and line.label.removeprefix(f"{title}, ")
            handles[told] = axes.plot(line.x, line.y, label=told, **look)[0]
            if line.low:
                axes.fill_between(line.x, line.low, line.high, color=look["color"], alpha=0.15, linewidth=0)
        dress(axes)
        axes.set_title(title)
        if not shared:
            style.legend(axes, 2 if single else 1)
        elif not axes.xaxis.get_tick_params()["labelbottom"]:
            axes.set_xlabel("")
    if shared:
        told_apart = {told: handle for told, handle in handles.items() if told}
        canvas.legend(told_apart.values(), told_apart.keys(), loc="outside lower center", ncols=3, handlelength=3)
    style.plain_log(panels[0])  # whose axis all share
    canvas.supylabel(ylabel, fontsize=9)
    style.save(canvas, path)
    return True


def _line(label: str, points: list[tuple[float, Value]], scale: float = 1.0) -> list[Line]:
    """What can be drawn on a log axis, with a band where there are several seeds."""
    points = [(x, v) for x, v in points if math.isfinite(v.mean) and v.mean > 0]
    if not points:
        return []
    x, y = [x for x, _ in points], [v.mean / scale for _, v in points]
    if all(v.seeds < 2 for _, v in points):
        return [Line(label, x, y, [], [])]
    low = [max(v.low, v.mean * 1e-3) / scale for _, v in points]
    return [Line(label, x, y, low, [v.high / scale for _, v in points])]


def _smooth(values: list[float]) -> list[float]:
    """Running mean over about a twentieth of the curve; the window shrinks at its ends."""
    half = max(1, len(values) // 40)
    return [float(np.mean(values[max(0, k - half) : k + half + 1])) for k in range(len(values))]
