"""What a variant looks like, the same in every figure; and the small things that all figures share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from experiments.core.figures import GRAY, PALETTE, RC
from experiments.report.records import Run, Variant

__all__ = ["GRAY", "PALETTE", "RC"]

MANY = tuple(colormaps["tab20"].colors)  # type: ignore[attr-defined]
DPI = 150
MARKERS = {"noncausal": "o", "causal": ">", "bidirectional": "D"}


def groups(run: Run) -> list[tuple[str, list[Variant]]]:
    """(title, rows) of the panels of a figure of lines: one, or one a mixer where there are too many lines for one."""
    trained = [v for v in run.variants if not v.untouched]
    by_mixer: dict[str, list[Variant]] = {}
    for variant in trained:
        by_mixer.setdefault(str(variant.mixer), []).append(variant)
    if len(trained) <= len(PALETTE) or len(by_mixer) in (1, len(trained)):
        return [("", run.variants)]
    return [(run.mixers[mixer], rows) for mixer, rows in by_mixer.items()]


def line(run: Run, variant: Variant) -> dict[str, Any]:
    """Color by variant, or by causality in a panel of its own; dashes if not normalized, marker by causality."""
    if variant.untouched:
        return {"color": GRAY, "linestyle": "-", "marker": "s"}
    title, rows = next((t, r) for t, r in groups(run) if variant in r)
    trained = [v for v in rows if not v.untouched]
    marker = MARKERS.get(variant.causality or "", "o")
    if title and by_switch(rows):
        color: Any = PALETTE[list(MARKERS.values()).index(marker)]
    else:
        palette = PALETTE if len(trained) <= len(PALETTE) else MANY
        color = palette[trained.index(variant) % len(palette)]
    return {"color": color, "linestyle": "--" if variant.normalize is False else "-", "marker": marker}


def by_switch(rows: list[Variant]) -> bool:
    """Whether causality and normalization tell these rows apart."""
    return len({(v.causality, v.normalize) for v in rows}) == len(rows)


def by_mixer(run: Run) -> dict[str, Any]:
    """A color for every mixer, for figures whose points are rows."""
    names = list(dict.fromkeys(str(v.mixer) for v in run.variants if not v.untouched))
    palette = PALETTE if len(names) <= len(PALETTE) else MANY
    return {name: palette[k % len(palette)] for k, name in enumerate(names)}


def panels(count: int, width: float, height: float, columns: int = 3, sharex: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, `width` × `height` inches each, which share their axes."""
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = Figure(figsize=(width * columns, height * rows), layout="constrained")
    found = canvas.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=True).ravel().tolist()
    for axes in found[count:]:
        axes.set_axis_off()
    for axes in found[max(0, count - columns) : count]:
        axes.tick_params(labelbottom=True)  # the lowest of its column, where the last row is not full
    return canvas, found[:count]


def ticks(axes: Axes, values: list[int]) -> None:
    """Ticks at these values alone."""
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))


def plain_log(axes: Axes, which: str = "y") -> None:
    """Label a log axis with plain numbers: at 1, 2 and 5 of each decade, over many decades at 1, within one evenly."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = sorted(axis.get_view_interval())
    span = high / max(low, 1e-300)
    narrow = MaxNLocator(5, steps=[1, 2, 5, 10])
    axis.set_major_locator(narrow if span < 8 else LogLocator(subs=(1, 2, 5) if span < 1e3 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))


def legend(axes: Axes, columns: int = 2) -> None:
    """Below the axes, where it hides nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=columns, handlelength=3)


def bare(axes: Axes) -> None:
    """No ticks, no grid, no frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def save(canvas: Figure, path: Path, vector: bool = True) -> None:
    """PNG at `path`, and SVG beside it."""
    canvas.savefig(path, dpi=DPI, metadata={"Software": None})
    if vector:
        canvas.set_layout_engine("none")  # everything has its place by now
        canvas.savefig(path.with_suffix(".svg"), metadata={"Date": None})
