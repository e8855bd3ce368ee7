"""The figure to look at first: errors and samples by size, of rows that show what normalization and causality do."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from experiments.ablation.description import VariantDescription
from experiments.core.figures import PALETTE
from experiments.report import style
from experiments.report.controls import control_rows
from experiments.report.errors import errors_by_seed, mean_error
from experiments.report.image_grids import Pixels, draw_block, read_image
from experiments.report.run_files import DESIGN_FIELDS, RunRecord

PIXELS = 128  # pixels per sample
TILE = 0.9  # inches per sample


def plot_overview(run: RunRecord, path: Path) -> bool:
    """Draw the overview's rows: error against size, beside a sample of each at every size.

    Returns:
        False if fewer than two sizes or rows were measured.
    """
    rows = overview_rows(run)
    sizes = [size for size in run.sizes if any(mean_error(run, row, size) is not None for row in rows)]
    if len(rows) < 2 or len(sizes) < 2:
        return False
    samples = [("teacher", [read_sample(run, run.directory / "teacher", size) for size in sizes])]
    samples += [(row.label, [_sample(run, row, size) for size in sizes]) for row in rows]
    has_samples = any(image is not None for _, images in samples for image in images)
    widths = [4.8, 1.6 + TILE * len(sizes)] if has_samples else [4.8]
    height = 0.3 + TILE * len(samples) if has_samples else 4.6
    canvas = Figure(figsize=(sum(widths), max(height, 4.6)), layout="constrained")
    axes = canvas.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    _draw_errors(axes[0], run, rows, sizes)
    if has_samples:
        _draw_samples(axes[1], samples, sizes)
    style.save_figure(canvas, path, vector=False)
    return True


def overview_rows(run: RunRecord) -> list[VariantDescription]:
    """Return the rows of the overview, the best at the largest size first.

    They are the reference row, rows that differ from it in normalization or in causality alone, the row that is closest
    to the teacher at the largest size, and the identity, which mixes nothing. Unfinished rows are left out.
    """
    rows = [variant for variant in run.trained if run.done(variant.name)]
    if run.reference not in rows or not run.sizes:
        return []
    largest = run.sizes[-1]
    measured = {row.name: mean_error(run, row, largest) for row in rows}
    errors = {name: math.inf if error is None else error for name, error in measured.items()}
    mixers = [row for row in rows if row.control is None]
    closest = min(mixers, key=lambda row: errors[row.name])
    identity = control_rows(run).identity
    selected = [row for row in rows if row in (closest, identity) or _differ_in_one_switch(row, run.reference)]
    return sorted(selected, key=lambda row: errors[row.name])


def read_sample(run: RunRecord, folder: Path, size: int) -> Pixels:
    """The sample of the last prompt: grids list those last whose objects share what the prompt does not name."""
    return read_image(folder / "samples" / str(size) / f"{max(0, len(run.description.prompts) - 1)}.png")


def _draw_errors(axes: Axes, run: RunRecord, rows: list[VariantDescription], sizes: list[int]) -> None:
    colors = iter(PALETTE)
    for row in rows:
        points = [(size, error) for size in sizes if (error := mean_error(run, row, size)) is not None]
        look: dict[str, Any]
        if row.control is None:
            marker = style.MARKERS.get(row.causality, "o")
            look = {"color": next(colors), "linestyle": style.DASHES[row.normalization], "marker": marker}
        else:
            look = {"color": style.GRAY, "linestyle": ":", "marker": "s"}
        axes.plot([x for x, _ in points], [y for _, y in points], label=row.label, **look)
        ranges = [[np.mean(e) for e in errors_by_seed(run, row, size).values()] for size, _ in points]
        axes.fill_between(
            [x for x, _ in points], [min(r) for r in ranges], [max(r) for r in ranges], color=look["color"], alpha=0.15
        )
    axes.set(xscale="log", yscale="log", ylabel="squared error to the teacher / its mean square")
    axes.set_xlabel(f"image side (px); distilled at {run.train_sizes_text}")
    style.set_ticks(axes, sizes)
    style.use_plain_log_labels(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), handlelength=3)


def _draw_samples(axes: Axes, samples: list[tuple[str, list[Pixels]]], sizes: list[int]) -> None:
    names = [textwrap.fill(label, 20, break_on_hyphens=False) for label, _ in samples]
    images = [[None if image is None else _enlarged_or_averaged(image) for image in row] for _, row in samples]
    draw_block(axes, names, [f"{size} px" for size in sizes], images, PIXELS)


def _differ_in_one_switch(row: VariantDescription, reference: VariantDescription | None) -> bool:
    """Whether they are the same row, or differ in normalization alone, or in causality alone."""
    if reference is None:
        return False
    different = {field for field in DESIGN_FIELDS if getattr(row, field) != getattr(reference, field)}
    return different <= {"normalization"} or different <= {"causality"}


def _enlarged_or_averaged(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image at the side that all are shown at: small ones with larger pixels, large ones averaged."""
    method = Image.Resampling.NEAREST if image.shape[0] < PIXELS else Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize((PIXELS, PIXELS), method))


def _sample(run: RunRecord, row: VariantDescription, size: int) -> Pixels:
    return next(
        (image for cell in run.done(row.name) if (image := read_sample(run, cell.directory, size)) is not None), None
    )
