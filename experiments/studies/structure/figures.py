"""The figures of the structure study: small multiples with a panel per mixer and a color per causality."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from experiments.core.figures import GRAY, PALETTE, RC
from experiments.studies.structure.analysis import GRID, MatrixAnalysis, analyze_mixer
from mixers import structure
from mixers.stages.scan_orders import SCANS, scan_orders
from mixers.traits import CAUSALITIES

COLORS = dict(zip(CAUSALITIES, PALETTE, strict=False))
COLUMNS = 4
"""Panels side by side."""

MIXERS_PER_PAGE = 8
RANK_TOLERANCE = 1e-6
"""Relative to the largest singular value; the one of `structure.numerical_rank`."""

DrawPanel = Callable[[Axes, MatrixAnalysis], None]
PlotLine = Callable[[Axes, MatrixAnalysis, dict[str, Any]], None]
"""Plots an analysis into a panel with the given color and label."""


def draw_figures(analyses: Sequence[MatrixAnalysis], directory: Path, scan_mixer: str | None = None) -> list[Path]:
    """Draw every figure as a PNG file.

    Args:
        analyses: as `analyze_mixers` returns them.
        directory: created if it is missing; files of the same names are replaced.
        scan_mixer: the mixer that shows the scan orders; it must offer a causal form with decay. None leaves that
            figure out.

    Returns:
        The paths of the files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(analysis.mixer for analysis in analyses))
    figures: dict[str, Figure] = {}
    paths = []
    with rc_context(RC):
        for page in range(math.ceil(len(names) / MIXERS_PER_PAGE)):
            page_names = names[page * MIXERS_PER_PAGE : (page + 1) * MIXERS_PER_PAGE]
            figures[f"matrices_{page + 1}"] = draw_causality_grid(analyses, page_names, _draw_matrix)
            figures[f"receptive_field_{page + 1}"] = draw_causality_grid(analyses, page_names, _draw_receptive_field)
        figures["singular_values"] = draw_panels(
            analyses, names, _plot_singular_values, "number", "singular value / largest"
        )
        figures["semiseparable_rank"] = draw_panels(
            analyses, names, _plot_block_ranks, "split before token", "rank of the block"
        )
        figures["row_sums"] = draw_panels(analyses, names, _plot_row_sums, "token", "sum of its row")
        figures["triangularity"] = draw_shares(analyses)
        if scan_mixer is not None:
            figures["scan_orders"] = draw_scan_orders(scan_mixer)
        for name, figure in figures.items():
            paths.append(directory / f"{name}.png")
            figure.savefig(paths[-1], dpi=110, bbox_inches="tight")
    return paths


def draw_causality_grid(analyses: Sequence[MatrixAnalysis], names: Sequence[str], draw_panel: DrawPanel) -> Figure:
    """Draw a grid of panels, mixers × causalities; an empty panel says that the mixer refuses that causality."""
    figure = Figure(figsize=(6.4, 1.75 * len(names) + 0.3))
    axes = figure.subplots(len(names), len(CAUSALITIES), squeeze=False)
    by_case = {(analysis.mixer, analysis.causality): analysis for analysis in analyses}
    for name, row in zip(names, axes, strict=True):
        for causality, panel in zip(CAUSALITIES, row, strict=True):
            panel.set(xticks=[], yticks=[])
            panel.grid(False)
            analysis = by_case.get((name, causality))
            if analysis is None:
                panel.text(0.5, 0.5, "refused", ha="center", va="center", color=GRAY, transform=panel.transAxes)
                panel.set_frame_on(False)
            else:
                draw_panel(panel, analysis)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    for causality, panel in zip(CAUSALITIES, axes[0], strict=True):
        panel.set_title(causality)
    return figure


def draw_panels(
    analyses: Sequence[MatrixAnalysis], names: Sequence[str], plot_line: PlotLine, xlabel: str, ylabel: str
) -> Figure:
    """Draw a panel per mixer with a line per causality."""
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / COLUMNS)
    figure = Figure(figsize=(2.5 * columns + 0.4, 1.9 * rows + 0.7))
    axes = figure.subplots(rows, columns, squeeze=False)
    for name, panel in zip(names, axes.flat, strict=False):
        for analysis in analyses:
            if analysis.mixer == name:
                plot_line(panel, analysis, {"color": COLORS[analysis.causality], "label": analysis.causality})
        panel.set_title(name, fontsize=9)
    for panel in list(axes.flat)[len(names) :]:
        panel.set_visible(False)
    lines = {line.get_label(): line for panel in axes.flat for line in panel.get_lines()}
    labels = [causality for causality in CAUSALITIES if causality in lines]
    figure.tight_layout(rect=(0.02, 0.03, 1, 0.95))
    figure.legend([lines[label] for label in labels], labels, loc="upper center", ncols=len(labels))
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    return figure


def draw_shares(analyses: Sequence[MatrixAnalysis]) -> Figure:
    """Draw stacked bars of how much of |W| lies before, on and after the diagonal."""
    figure = Figure(figsize=(7, 0.22 * len(analyses) + 0.9))
    panel = figure.subplots()
    left = np.zeros(len(analyses))
    shares = np.array([analysis.shares for analysis in analyses]).T
    labels = ("before the diagonal", "on it", "after it")
    for label, color, values in zip(labels, PALETTE, shares, strict=False):
        panel.barh(range(len(analyses)), values, left=left, color=color, label=label, height=0.8)
        left += values
    panel.set(yticks=range(len(analyses)), xlim=(0, 1), xlabel="share of Σ|W|")
    panel.set_yticklabels([f"{analysis.mixer}, {analysis.causality}" for analysis in analyses], fontsize=7.5)
    panel.set_ylim(len(analyses) - 0.4, -0.6)
    panel.grid(False)
    panel.legend(loc="lower center", ncols=3, bbox_to_anchor=(0.5, 1.0))
    return figure


def draw_scan_orders(name: str) -> Figure:
    """Draw the path of every scan over the image, and below it what the center token of a causal mixer sees."""
    figure = Figure(figsize=(2.0 * len(SCANS), 4.4))
    paths, fields = figure.subplots(2, len(SCANS))
    height, width = GRID
    center = height // 2 * width + width // 2
    for scan, path, field in zip(SCANS, paths, fields, strict=True):
        for number, order in enumerate(scan_orders(scan, GRID)):
            tokens = torch.arange(height * width) if order is None else order
            _plot_path(path, tokens, width, number)
        path.set(title=scan, xlim=(-0.6, width - 0.2), ylim=(height - 0.2, -0.6))
        _draw_receptive_field(field, analyze_mixer(name, causality="causal", scan=scan), center)
        for panel in (path, field):
            panel.set(xticks=[], yticks=[], aspect="equal")
            panel.grid(False)
    paths[0].set_ylabel("order")
    fields[0].set_ylabel(f"seen by the center\n({name})")
    figure.tight_layout()
    return figure


def _plot_path(panel: Axes, tokens: Tensor, width: int, number: int) -> None:
    """Plot one direction of a scan, shifted by its number so that directions do not cover each other."""
    x = tokens % width + 0.12 * number
    y = tokens // width + 0.12 * number
    panel.plot(x, y, color=PALETTE[number], linewidth=1.2)
    panel.plot(x[:1], y[:1], "o", color=PALETTE[number])


def _draw_matrix(panel: Axes, analysis: MatrixAnalysis) -> None:
    """Draw each row relative to its largest weight, so that unnormalized rows are visible; blue is negative."""
    largest = analysis.matrix.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    panel.imshow((analysis.matrix / largest).numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")


def _draw_receptive_field(panel: Axes, analysis: MatrixAnalysis, token: int | None = None) -> None:
    """Draw what a token sees; None: the center token."""
    height, width = analysis.grid
    token = height // 2 * width + width // 2 if token is None else token
    field = structure.receptive_field(analysis.matrix, analysis.grid)[token]
    panel.imshow(field.numpy(), cmap="viridis", vmin=0, interpolation="nearest")
    panel.plot(token % width, token // width, "s", color="white", markerfacecolor="none", markersize=6)


def _plot_singular_values(panel: Axes, analysis: MatrixAnalysis, line: dict[str, Any]) -> None:
    values = torch.linalg.svdvals(analysis.matrix)
    values = (values / values[0]).clamp_min(1e-17)
    panel.semilogy(range(1, len(values) + 1), values, **line)
    panel.plot(analysis.rank, values[analysis.rank - 1], "o", color=line["color"])
    panel.axhline(RANK_TOLERANCE, color=GRAY, linewidth=0.7, linestyle=":")


def _plot_block_ranks(panel: Axes, analysis: MatrixAnalysis, line: dict[str, Any]) -> None:
    """Plot the ranks of the blocks below the diagonal (solid) and above it (dotted), for every split."""
    matrix = analysis.matrix
    tolerance = float(RANK_TOLERANCE * torch.linalg.matrix_norm(matrix, ord=2))
    splits = range(1, matrix.shape[-1])
    below = [_rank(matrix[split:, :split], tolerance) for split in splits]
    above = [_rank(matrix[:split, split:], tolerance) for split in splits]
    panel.plot(splits, below, "-", **line)
    panel.plot(splits, above, ":", color=line["color"], label="_")  # no entry of its own in the legend


def _rank(block: Tensor, tolerance: float) -> int:
    return int((torch.linalg.svdvals(block) > tolerance).sum())


def _plot_row_sums(panel: Axes, analysis: MatrixAnalysis, line: dict[str, Any]) -> None:
    sums = structure.row_sums(analysis.matrix)
    panel.plot(sums.numpy(), **line)
    if (sums - 1).abs().max() < 0.05:  # rows that sum to one up to eps: do not zoom into the sixth digit
        panel.set_ylim(0.9, 1.1)
