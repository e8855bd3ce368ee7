"""The figures of structure: small multiples, a panel a mixer, a color a causality."""

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

from experiments.core.figures import GRAY, PALETTE, RC
from experiments.studies.structure.examine import GRID, Record, examine
from mixers import structure
from mixers.stages.scan_orders import SCANS, scan_orders
from mixers.traits import CAUSALITIES

COLORS = dict(zip(CAUSALITIES, PALETTE, strict=False))
COLUMNS, ROWS = 4, 8  # panels side by side; mixers on one page of pictures


def draw(records: Sequence[Record], directory: Path, scanned: str | None = None) -> list[Path]:
    """Draw every figure as a PNG file into `directory`; returns the files.

    Args:
        records: what to draw, as `records()` gives it.
        directory: made where it is missing; files of the same names are replaced.
        scanned: the mixer that shows the scan orders: causal, with decay. None leaves that figure out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(record.mixer for record in records))
    figures: dict[str, Figure] = {}
    with rc_context(RC):
        for page in range(math.ceil(len(names) / ROWS)):
            shown = names[page * ROWS : (page + 1) * ROWS]
            figures[f"matrices_{page + 1}"] = gallery(records, shown, _matrix)
            figures[f"receptive_field_{page + 1}"] = gallery(records, shown, _field)
        figures["singular_values"] = multiples(records, names, _spectrum, "number", "singular value / largest")
        figures["semiseparable_rank"] = multiples(records, names, _blocks, "split before token", "rank of the block")
        figures["row_sums"] = multiples(records, names, _sums, "token", "sum of its row")
        figures["triangularity"] = shares(records)
        if scanned is not None:
            figures["scan_orders"] = scans(scanned)
        paths = []
        for name, figure in figures.items():
            paths.append(directory / f"{name}.png")
            figure.savefig(paths[-1], dpi=110, bbox_inches="tight")
    return paths


def gallery(records: Sequence[Record], names: Sequence[str], paint: Callable[[Axes, Record], None]) -> Figure:
    """Rows: mixers; columns: causalities; a panel that is refused stays empty and says so."""
    figure = Figure(figsize=(6.4, 1.75 * len(names) + 0.3))
    axes = figure.subplots(len(names), len(CAUSALITIES), squeeze=False)
    found = {(record.mixer, record.causality): record for record in records}
    for name, row in zip(names, axes, strict=True):
        for causality, panel in zip(CAUSALITIES, row, strict=True):
            panel.set(xticks=[], yticks=[])
            panel.grid(False)
            record = found.get((name, causality))
            if record is None:
                panel.text(0.5, 0.5, "refused", ha="center", va="center", color=GRAY, transform=panel.transAxes)
                panel.set_frame_on(False)
            else:
                paint(panel, record)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    for causality, panel in zip(CAUSALITIES, axes[0], strict=True):
        panel.set_title(causality)
    return figure


def multiples(
    records: Sequence[Record],
    names: Sequence[str],
    plot: Callable[[Axes, Record, dict[str, Any]], None],
    x: str,
    y: str,
) -> Figure:
    """A panel a mixer, a line a causality."""
    rows = math.ceil(len(names) / COLUMNS)
    figure = Figure(figsize=(2.5 * min(COLUMNS, len(names)) + 0.4, 1.9 * rows + 0.7))
    axes = figure.subplots(rows, min(COLUMNS, len(names)), squeeze=False)
    for name, panel in zip(names, axes.flat, strict=False):
        for record in (r for r in records if r.mixer == name):
            plot(panel, record, {"color": COLORS[record.causality], "label": record.causality})
        panel.set_title(name, fontsize=9)
    for panel in list(axes.flat)[len(names) :]:
        panel.set_visible(False)
    lines = {line.get_label(): line for panel in axes.flat for line in panel.get_lines()}
    shown = {name: lines[name] for name in CAUSALITIES if name in lines}
    figure.tight_layout(rect=(0.02, 0.03, 1, 0.95))
    figure.legend(shown.values(), shown.keys(), loc="upper center", ncols=len(shown))
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
    return figure


def shares(records: Sequence[Record]) -> Figure:
    """Stacked bars: how much of |W| lies before, on and after the diagonal."""
    figure = Figure(figsize=(7, 0.22 * len(records) + 0.9))
    panel = figure.subplots()
    left = np.zeros(len(records))
    for part, color, values in zip(
        ("before the diagonal", "on it", "after it"),
        PALETTE,
        np.array([record.shares for record in records]).T,
        strict=False,
    ):
        panel.barh(range(len(records)), values, left=left, color=color, label=part, height=0.8)
        left += values
    panel.set(yticks=range(len(records)), xlim=(0, 1), xlabel="share of Σ|W|")
    panel.set_yticklabels([f"{r.mixer}, {r.causality}" for r in records], fontsize=7.5)
    panel.set_ylim(len(records) - 0.4, -0.6)
    panel.grid(False)
    panel.legend(loc="lower center", ncols=3, bbox_to_anchor=(0.5, 1.0))
    return figure


def scans(name: str) -> Figure:
    """The path of every scan over the image, and what the center token of a causal mixer then sees."""
    figure = Figure(figsize=(2.0 * len(SCANS), 4.4))
    paths, fields = figure.subplots(2, len(SCANS))
    center = GRID[0] // 2 * GRID[1] + GRID[1] // 2
    for scan, path, field in zip(SCANS, paths, fields, strict=True):
        for number, order in enumerate(scan_orders(scan, GRID)):
            places = torch.arange(GRID[0] * GRID[1]) if order is None else order
            across, down = places % GRID[1] + 0.12 * number, places // GRID[1] + 0.12 * number
            path.plot(across, down, color=PALETTE[number], linewidth=1.2)
            path.plot(across[:1], down[:1], "o", color=PALETTE[number])
        path.set(title=scan, xlim=(-0.6, GRID[1] - 0.2), ylim=(GRID[0] - 0.2, -0.6))
        record = examine(name, causality="causal", scan=scan)
        _field(field, record, center)
        for panel in (path, field):
            panel.set(xticks=[], yticks=[], aspect="equal")
            panel.grid(False)
    paths[0].set_ylabel("order")
    fields[0].set_ylabel(f"seen by the center\n({name})")
    figure.tight_layout()
    return figure


def _matrix(panel: Axes, record: Record) -> None:
    """Each row over its largest weight, so that unnormalized rows can be seen; blue is negative."""
    size = record.matrix.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    panel.imshow((record.matrix / size).numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")


def _field(panel: Axes, record: Record, token: int | None = None) -> None:
    height, width = record.grid
    token = height // 2 * width + width // 2 if token is None else token
    field = structure.receptive_field(record.matrix, record.grid)[token]
    panel.imshow(field.numpy(), cmap="viridis", vmin=0, interpolation="nearest")
    panel.plot(token % width, token // width, "s", color="white", markerfacecolor="none", markersize=6)


def _spectrum(panel: Axes, record: Record, look: dict[str, Any]) -> None:
    values = torch.linalg.svdvals(record.matrix)
    values = (values / values[0]).clamp_min(1e-17)
    panel.semilogy(range(1, len(values) + 1), values, **look)
    panel.plot(record.rank, values[record.rank - 1], "o", color=look["color"])
    panel.axhline(1e-6, color=GRAY, linewidth=0.7, linestyle=":")


def _blocks(panel: Axes, record: Record, look: dict[str, Any]) -> None:
    matrix = record.matrix
    least = 1e-6 * torch.linalg.matrix_norm(matrix, ord=2)
    splits = range(1, matrix.shape[-1])
    for block, line in ((lambda i: matrix[i:, :i], "-"), (lambda i: matrix[:i, i:], ":")):
        ranks = [int((torch.linalg.svdvals(block(i)) > least).sum()) for i in splits]
        panel.plot(splits, ranks, line, **{**look, "label": look["label"] if line == "-" else "_"})


def _sums(panel: Axes, record: Record, look: dict[str, Any]) -> None:
    sums = structure.row_sums(record.matrix)
    panel.plot(sums.numpy(), **look)
    if (sums - 1).abs().max() < 0.05:  # rows that sum to one, but for eps: not a matter of the sixth digit
        panel.set_ylim(0.9, 1.1)
