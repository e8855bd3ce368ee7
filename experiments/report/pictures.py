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

LICENCE = "Twemoji graphics © Twitter, Inc. and other contributors, CC-BY 4.0."


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
    canvas = Figure(figsize=(1.5 + 1.15 * columns, 0.55 + 1.15 * len(rows)))
    grid = canvas.subplots(len(rows), columns, squeeze=False)
    left, top = 1.45 / canvas.get_figwidth(), 1 - 0.5 / canvas.get_figheight()
    canvas.subplots_adjust(left=left, right=0.995, bottom=0.005, top=top, wspace=0.04, hspace=0.04)
    for (label, _), axes, row in zip(rows, grid, pictures, strict=True):
        for k, picture in enumerate(row):
            style.bare(axes[k])
            if picture is None:
                axes[k].text(0.5, 0.5, "none", ha="center", va="center", color="#999999", transform=axes[k].transAxes)
            else:
                axes[k].imshow(picture, interpolation="nearest")
        weight = "bold" if label == "teacher" else "normal"
        axes[0].set_ylabel(
            textwrap.fill(label, 20), rotation=0, ha="right", va="center", fontsize=8, labelpad=6, fontweight=weight
        )
    for axes, prompt in zip(grid[0], run.prompts, strict=False):
        axes.set_title("\n".join(textwrap.wrap(prompt, 18, max_lines=3, placeholder="…")), fontsize=7)
    style.save(canvas, path, vector=False)
    return True


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
        axes.imshow(np.abs(field), cmap="Greys", vmin=0, vmax=limit, interpolation="nearest")

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


def _picture(path: Path) -> NDArray[np.uint8] | None:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError):
        return None
