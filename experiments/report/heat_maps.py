"""Figures of colored squares: a metric by variant and by a field of its rows, such as site or timestep."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.ablation.description import VariantDescription
from experiments.metrics import HeatMap, Metric, MetricRow
from experiments.report import style
from experiments.report.run_files import RunRecord

BEYOND = "#d7301f"
Panel = tuple[int, list[Any], NDArray[np.float64]]
"""Size in pixels, values of the columns, and the colors (variants, columns)."""


def plot_heat_map(run: RunRecord, metric: type[Metric], spec: HeatMap, path: Path) -> bool:
    """Draw geometric means over seeds: a row for each trained variant, a panel for each size, one color scale.

    Returns:
        False if there is nothing to draw.
    """
    variants = [v for v in run.trained if any(c.rows(metric.name, metric.row) for c in run.done(v.name))]
    panels = _panels(run, metric, spec, variants)
    if not panels:
        return False
    values = np.concatenate([colors[np.isfinite(colors) & (colors > 0)] for _, _, colors in panels])
    if not values.size:
        return False
    worthless = spec.worthless if spec.worthless is not None else float(values.max())
    top = min(float(values.max()), worthless) if values.min() < worthless else float(values.max())
    norm = LogNorm(values.min(), max(top, values.min() * 1.01))
    wide = sum(len(columns) for _, columns, _ in panels)
    canvas = Figure(figsize=(3.2 + 0.5 * wide, 1.6 + 0.25 * len(variants)), layout="constrained")
    ratios = [len(columns) for _, columns, _ in panels]
    all_axes = canvas.subplots(1, len(panels), squeeze=False, sharey=True, width_ratios=ratios)[0]
    colors = colormaps["viridis"].with_extremes(bad="#dddddd", over=BEYOND)
    for axes, (size, columns, grid) in zip(all_axes, panels, strict=True):
        labels = [shorten_site(str(column)) for column in columns]
        image = axes.imshow(grid, norm=norm, cmap=colors, aspect="auto")
        style.remove_frame(axes)
        for position in _changes([variant.mixer for variant in variants]):
            axes.axhline(position - 0.5, color="white", linewidth=2.5)
        for position in _changes([label.split(" ")[0] for label in labels]) if spec.column == "site" else []:
            axes.axvline(position - 0.5, color="white", linewidth=2.5)
        axes.set_xticks(range(len(columns)), labels, rotation=60, ha="right", fontsize=7)
        axes.set_title(f"{size} px")
    all_axes[0].set_yticks(range(len(variants)), [variant.label for variant in variants], fontsize=8)
    bar = canvas.colorbar(image, ax=all_axes, shrink=0.8, extend="max" if values.max() > norm.vmax else "neither")
    bar.set_label(metric.quantity(spec.quantity).label, fontsize=7)
    style.use_plain_log_labels(bar.ax)
    style.save_figure(canvas, path)
    return True


def shorten_site(site: str) -> str:
    """Shorten "up_blocks.1.attentions.0.transformer_blocks.0.attn1" to "up 1.0"."""
    match = re.match(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?attentions\.(\d+)\.transformer_blocks\.(\d+)", site)
    if not match:
        return site
    position = ".".join(part for part in (match[2], match[3]) if part)
    return f"{match[1]} {position}" + (f" #{match[4]}" if match[4] != "0" else "")


def _panels(run: RunRecord, metric: type[Metric], spec: HeatMap, variants: list[VariantDescription]) -> list[Panel]:
    cells = {v.name: [c.rows(metric.name, metric.row) for c in run.done(v.name)] for v in variants}
    keys = dict.fromkeys(
        (row.height, getattr(row, spec.column))  # type: ignore[attr-defined]  # checked at registration
        for by_cell in cells.values()
        for rows in by_cell
        for row in _square(rows)
    )
    panels = []
    for size in sorted({size for size, _ in keys}):
        columns = [column for its_size, column in keys if its_size == size]
        logs = [[_log_mean(cells[v.name], spec, size, column) for column in columns] for v in variants]
        panels.append((size, columns, np.exp(np.array(logs, dtype=float))))
    return panels


def _square(rows: Sequence[MetricRow]) -> list[Any]:
    return [row for row in rows if getattr(row, "height", None) == getattr(row, "width", None)]


def _log_mean(cells: Sequence[Sequence[MetricRow]], spec: HeatMap, size: int, column: Any) -> float:
    """Mean log over cells; not a number if one has no value above zero."""
    values = [
        getattr(row, spec.quantity)
        for rows in cells
        for row in _square(rows)
        if row.height == size and getattr(row, spec.column) == column
    ]
    if not values or any(value is None or not value > 0 for value in values):
        return float("nan")
    return float(np.mean(np.log(values)))


def _changes(names: Sequence[object]) -> list[int]:
    """Positions where a name differs from the one before it."""
    return [k for k in range(1, len(names)) if names[k] != names[k - 1]]
