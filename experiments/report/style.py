"""How a variant looks, the same in every figure of a report; and what figures of lines and points share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from experiments.ablation.description import VariantDescription
from experiments.core.figures import GRAY, PALETTE
from experiments.report.run_files import RunRecord

MANY_COLORS = tuple(colormaps["tab20"].colors)  # type: ignore[attr-defined]
DPI = 150
BACKGROUND_DASHES = ("-", "--", ":", "-.")
DASHES = {"normalized": "-", "not normalized": "--", "mean scale": "-."}
MARKERS = {"noncausal": "o", "causal": ">", "bidirectional": "D"}


def group_variants(run: RunRecord) -> list[tuple[str, list[VariantDescription]]]:
    """Return (title, rows) for the panels of a figure of lines: one panel, or one per mixer if there are many lines.

    Controls have no panel of their own if there are several: they are `background_rows` of all.
    """
    by_mixer: dict[str, list[VariantDescription]] = {}
    for variant in run.trained:
        if variant.control is None:
            by_mixer.setdefault(variant.mixer, []).append(variant)
    if len(run.trained) <= len(PALETTE) or len(by_mixer) <= 1 or all(len(rows) == 1 for rows in by_mixer.values()):
        return [("", list(run.variants))]
    return [(run.mixer_labels[mixer], rows) for mixer, rows in by_mixer.items()]


def background_rows(run: RunRecord) -> list[VariantDescription]:
    """Return the controls if every panel shows them behind its rows; none if there is one panel."""
    if len(group_variants(run)) == 1:
        return []
    return [variant for variant in run.trained if variant.control is not None]


def line_style(run: RunRecord, variant: VariantDescription) -> dict[str, Any]:
    """Color by variant, or by causality in a panel of one mixer; dashed unless normalized; marker by causality.

    Background rows are gray and thin, and differ in their dashes.
    """
    if variant.untouched:
        return {"color": GRAY, "linestyle": "-", "marker": "s"}
    background = background_rows(run)
    if variant in background:
        dash = BACKGROUND_DASHES[background.index(variant) % len(BACKGROUND_DASHES)]
        return {"color": "#888888", "linestyle": dash, "marker": "", "linewidth": 1.1, "zorder": 1}
    title, rows = next((title, rows) for title, rows in group_variants(run) if variant in rows)
    trained = [row for row in rows if not row.untouched]
    marker = MARKERS.get(variant.causality, "o")
    if title and differ_in_switches(rows):
        color: Any = PALETTE[list(MARKERS.values()).index(marker)]
    else:
        palette = PALETTE if len(trained) <= len(PALETTE) else MANY_COLORS
        color = palette[trained.index(variant) % len(palette)]
    return {"color": color, "linestyle": DASHES[variant.normalization], "marker": marker}


def differ_in_switches(rows: list[VariantDescription]) -> bool:
    """Whether causality and normalization distinguish these rows."""
    return len({(row.causality, row.normalization) for row in rows}) == len(rows)


def color_by_mixer(run: RunRecord) -> dict[str, Any]:
    """Return a color for every mixer, for figures whose points are rows."""
    names = list(dict.fromkeys(variant.mixer for variant in run.trained))
    palette = PALETTE if len(names) <= len(PALETTE) else MANY_COLORS
    return {name: palette[k % len(palette)] for k, name in enumerate(names)}


def make_panels(
    count: int, width: float, height: float, columns: int = 3, sharex: bool = True
) -> tuple[Figure, list[Axes]]:
    """Return a figure of `count` panels, each `width` × `height` inches, which share their axes."""
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = canvas.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=True).ravel().tolist()
    for axes in panels[count:]:
        axes.set_axis_off()
    for axes in panels[max(0, count - columns) : count]:
        axes.tick_params(labelbottom=True)  # the lowest panel of its column, if the last row is not full
    return canvas, panels[:count]


def set_ticks(axes: Axes, values: list[Any]) -> None:
    """Put ticks at these values alone."""
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))


def use_plain_log_labels(axes: Axes, which: str = "y") -> None:
    """Label a log axis with plain numbers: at 1, 2 and 5 of a decade, at 1 over many decades, evenly within one."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = sorted(axis.get_view_interval())
    span = high / max(low, 1e-300)
    narrow = MaxNLocator(5, steps=[1, 2, 5, 10])
    axis.set_major_locator(narrow if span < 8 else LogLocator(subs=(1, 2, 5) if span < 1e3 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))


def add_legend(axes: Axes, columns: int = 2) -> None:
    """Add a legend below the axes, where it hides nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=columns, handlelength=3)


def remove_frame(axes: Axes) -> None:
    """Remove ticks, grid and frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def save_figure(canvas: Figure, path: Path, vector: bool = True) -> None:
    """Write a PNG, and an SVG beside it if `vector`."""
    canvas.savefig(path, dpi=DPI, metadata={"Software": None})
    if vector:
        canvas.set_layout_engine("none")  # the layout is final by now
        canvas.savefig(path.with_suffix(".svg"), metadata={"Date": None})
