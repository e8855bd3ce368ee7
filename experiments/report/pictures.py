"""Figures made of pictures: sample grids and mixing matrices."""

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
from experiments.report.records import Run

Picture = NDArray[np.uint8] | None
LICENSE = "Twemoji graphics © Twitter, Inc. and other contributors, CC-BY 4.0."


def sample_grid(run: Run, size: int, path: Path) -> bool:
    """Rows: teacher, variants; columns: prompts. False where there is no picture at all."""
    rows = [("teacher", run.directory / "teacher" / "samples" / str(size))]
    for variant in run.variants:
        folders = [c.directory / "samples" / str(size) for c in run.done(variant.name)]
        rows += [(variant.label, f) for f in folders if f.is_dir()][:1]
    columns = len(run.prompts) or max((len(list(f.glob("*.png"))) for _, f in rows if f.is_dir()), default=0)
    pictures = [[_picture(folder / f"{k}.png") for k in range(columns)] for _, folder in rows]
    if not any(p is not None for row in pictures for p in row):
        return False
    names = [textwrap.fill(label, 16) for label, _ in rows]
    prompts = ["\n".join(textwrap.wrap(p, 18, max_lines=3, placeholder="…")) for p in run.prompts[:columns]]
    high, wide = 0.55 + 1.15 * len(rows), 1.7 + 1.15 * columns
    blocks = max(1, round(math.sqrt(high / wide / 1.2)))  # beside each other, where one would be a long strip
    length = -(-len(rows) // blocks)
    canvas = Figure(figsize=(wide * blocks, 0.55 + 1.15 * length), layout="constrained")
    for k, axes in enumerate(canvas.subplots(1, blocks, squeeze=False)[0]):
        part = slice(k * length, (k + 1) * length)
        _wall(axes, names[part], prompts, pictures[part], size)
        axes.set_ylim(length * (size + _gap(size)), 0)
    style.save(canvas, path, vector=False)
    return True


def _wall(axes: Axes, names: list[str], prompts: list[str], pictures: list[list[Picture]], size: int) -> None:
    """Pictures with their names and prompts; one axes for each would take seconds."""
    axes.imshow(_mosaic(pictures, size), interpolation="nearest")
    style.bare(axes)
    down, across = ([(k + 0.5) * (size + _gap(size)) for k in range(n)] for n in (len(names), len(pictures[0])))
    for y, row in zip(down, pictures, strict=True):
        for x in (x for x, picture in zip(across, row, strict=True) if picture is None):
            axes.text(x, y, "none", ha="center", va="center", color="#999999")
    axes.set_yticks(down, names, fontsize=8)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == "teacher" else "normal")
    axes.set_xticks(across[: len(prompts)], prompts, fontsize=7)
    axes.tick_params(length=0, top=True, labeltop=True, labelbottom=False)


def _gap(size: int) -> int:
    return max(1, size // 32)


def _mosaic(pictures: list[list[Picture]], size: int) -> NDArray[np.uint8]:
    """All pictures in one, white between them and where there is none."""
    step = size + _gap(size)
    found = np.full((step * len(pictures), step * len(pictures[0]), 3), 255, np.uint8)
    for y, row in enumerate(pictures):
        for x, picture in enumerate(row):
            if picture is not None:
                part = picture[:size, :size]
                found[y * step : y * step + part.shape[0], x * step : x * step + part.shape[1]] = part
    return found


def matrices(run: Run, path: Path) -> bool:
    """The mixing matrix of each variant, white at 0."""

    def show(axes: Axes, matrix: NDArray[np.float32]) -> None:
        finite = np.abs(matrix[np.isfinite(matrix)])
        # a percentile, or one strong entry would leave the rest of the panel blank
        limit = float(np.percentile(finite, 99.5)) if finite.size else 0.0
        limit = limit or (float(finite.max()) if finite.size else 0.0) or 1.0
        axes.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set_xlabel(f"±{limit:.2g}", fontsize=7, color="#666666")

    return _multiples(run, "mixing_matrix", show, path)


def fields(run: Run, path: Path) -> bool:
    """The receptive field of each variant."""

    def show(axes: Axes, field: NDArray[np.float32]) -> None:
        limit = float(np.nanpercentile(np.abs(field), 99.8)) or 1.0
        axes.imshow(np.abs(field), cmap="Grays", vmin=0, vmax=limit, interpolation="nearest")

    return _multiples(run, "receptive_field", show, path)


def _multiples(run: Run, name: str, show: Callable[[Axes, NDArray[np.float32]], None], path: Path) -> bool:
    """One panel per variant, of its first finished seed that has the array."""
    found = []
    for variant in run.variants:
        seen = [array for c in run.done(variant.name) if (array := c.array(name)) is not None][:1]
        found += [(variant.label, array) for array in seen]
    if not found:
        return False
    columns = min(6 if len(found) > 8 else 4, len(found))
    rows = math.ceil(len(found) / columns)
    engine = ConstrainedLayoutEngine(h_pad=0.1)  # room between a panel's scale and the title below it
    canvas = Figure(
        figsize=((1.75 if columns > 4 else 2.15) * columns, (2.2 if columns > 4 else 2.6) * rows), layout=engine
    )
    panels = canvas.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    for axes, (label, array) in zip(panels, found, strict=False):
        style.bare(axes)
        show(axes, array)
        axes.set_title(textwrap.fill(label, 24), fontsize=8 if columns < 5 else 7)
    style.save(canvas, path, vector=False)
    return True


def _picture(path: Path) -> Picture:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError):
        return None
