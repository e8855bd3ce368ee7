"""Figures made of images: samples of every variant, mixing matrices and receptive fields."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from experiments.report import style
from experiments.report.run_files import RunRecord

Pixels = NDArray[np.uint8] | None
"""An RGB image; None if it cannot be read."""


def plot_samples(run: RunRecord, size: int, path: Path) -> bool:
    """Draw samples at a size: rows are the teacher and the variants, columns are prompts. False if there is none."""
    rows = [("teacher", run.directory / "teacher" / "samples" / str(size))]
    for variant in run.variants:
        folders = [cell.directory / "samples" / str(size) for cell in run.done(variant.name)]
        rows += [(variant.label, folder) for folder in folders if folder.is_dir()][:1]
    prompts = run.description.prompts
    columns = len(prompts) or max((len(list(f.glob("*.png"))) for _, f in rows if f.is_dir()), default=0)
    images = [[read_image(folder / f"{k}.png") for k in range(columns)] for _, folder in rows]
    if not any(image is not None for row in images for image in row):
        return False
    names = [textwrap.fill(label, 16) for label, _ in rows]
    headings = ["\n".join(textwrap.wrap(p, 18, max_lines=3, placeholder="…")) for p in prompts[:columns]]
    high = 0.55 + 1.15 * len(rows)
    wide = 1.7 + 1.15 * columns
    blocks = max(1, round(math.sqrt(high / wide / 1.2)))  # side by side, if one block would be a long strip
    length = -(-len(rows) // blocks)
    canvas = Figure(figsize=(wide * blocks, 0.55 + 1.15 * length), layout="constrained")
    for k, axes in enumerate(canvas.subplots(1, blocks, squeeze=False)[0]):
        part = slice(k * length, (k + 1) * length)
        draw_block(axes, names[part], headings, images[part], size)
        axes.set_ylim(length * (size + _gap(size)), 0)
    style.save_figure(canvas, path, vector=False)
    return True


def plot_mixing_matrices(run: RunRecord, path: Path) -> bool:
    """Draw the mixing matrix of each variant, white at 0."""

    def draw(axes: Axes, matrix: NDArray[np.float32]) -> None:
        finite = np.abs(matrix[np.isfinite(matrix)])
        # A percentile, because one strong entry would leave the rest of the panel blank.
        limit = float(np.percentile(finite, 99.5)) if finite.size else 0.0
        limit = limit or (float(finite.max()) if finite.size else 0.0) or 1.0
        axes.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set_xlabel(f"±{limit:.2g}", fontsize=7, color="#666666")

    return _small_multiples(run, "mixing_matrix", draw, path)


def plot_receptive_fields(run: RunRecord, path: Path) -> bool:
    """Draw the receptive field of each variant."""

    def draw(axes: Axes, field: NDArray[np.float32]) -> None:
        limit = float(np.nanpercentile(np.abs(field), 99.8)) or 1.0
        axes.imshow(np.abs(field), cmap="Grays", vmin=0, vmax=limit, interpolation="nearest")

    return _small_multiples(run, "receptive_field", draw, path)


def draw_block(axes: Axes, names: list[str], headings: list[str], images: list[list[Pixels]], size: int) -> None:
    """Draw images with their names and prompts as one mosaic; separate axes for each would take seconds."""
    axes.imshow(_mosaic(images, size), interpolation="nearest")
    style.remove_frame(axes)
    step = size + _gap(size)
    down = [(k + 0.5) * step for k in range(len(names))]
    across = [(k + 0.5) * step for k in range(len(images[0]))]
    for y, row in zip(down, images, strict=True):
        for x in (x for x, image in zip(across, row, strict=True) if image is None):
            axes.text(x, y, "none", ha="center", va="center", color="#999999")
    axes.set_yticks(down, names, fontsize=8)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == "teacher" else "normal")
    axes.set_xticks(across[: len(headings)], headings, fontsize=7)
    axes.tick_params(length=0, top=True, labeltop=True, labelbottom=False)


def _gap(size: int) -> int:
    return max(1, size // 32)


def _mosaic(images: list[list[Pixels]], size: int) -> NDArray[np.uint8]:
    """All images in one, with white between them and in place of missing ones."""
    step = size + _gap(size)
    mosaic = np.full((step * len(images), step * len(images[0]), 3), 255, np.uint8)
    for y, row in enumerate(images):
        for x, image in enumerate(row):
            if image is not None:
                part = image[:size, :size]
                mosaic[y * step : y * step + part.shape[0], x * step : x * step + part.shape[1]] = part
    return mosaic


def _small_multiples(run: RunRecord, name: str, draw: Callable[[Axes, NDArray[np.float32]], None], path: Path) -> bool:
    """Draw one panel per variant, of its first finished seed that has the array."""
    panels = []
    for variant in run.variants:
        arrays = [array for cell in run.done(variant.name) if (array := cell.array(name)) is not None]
        panels += [(variant.label, array) for array in arrays[:1]]
    if not panels:
        return False
    columns = min(6 if len(panels) > 8 else 4, len(panels))
    rows = math.ceil(len(panels) / columns)
    engine = ConstrainedLayoutEngine(h_pad=0.1)  # room between a panel's scale and the title below it
    small = columns > 4
    canvas = Figure(figsize=((1.75 if small else 2.15) * columns, (2.2 if small else 2.6) * rows), layout=engine)
    all_axes = canvas.subplots(rows, columns, squeeze=False).ravel()
    for axes in all_axes[len(panels) :]:
        axes.set_axis_off()
    for axes, (label, array) in zip(all_axes, panels, strict=False):
        style.remove_frame(axes)
        draw(axes, array)
        axes.set_title(textwrap.fill(label, 24), fontsize=7 if small else 8)
    style.save_figure(canvas, path, vector=False)
    return True


def read_image(path: Path) -> Pixels:
    """Read an image as RGB; None if that is not possible."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError):
        return None
