"""Figures of squares: the error of every site on the UNet's shape, and of every timestep."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from experiments.report import style
from experiments.report.records import Cell, Run

WORTHLESS = 1.0
"""Relative error of an output of zeros: shades beyond it would be lost to those below, and tell nothing."""
COLORS = colormaps["viridis"].with_extremes(bad="#dddddd", over="#d7301f")


def sites(run: Run, path: Path) -> bool:
    """A row a variant, a column a self-attention layer from the way down to the way up; a panel a size."""
    return _maps(run, "sites", "site", "relative_error", _short, path)


def timesteps(run: Run, path: Path) -> bool:
    """A row a variant, a column a timestep; a panel a size."""
    return _maps(run, "timesteps", "timestep", "relative_error_to_teacher", str, path)


def _maps(run: Run, kind: str, key: str, value: str, told: Any, path: Path) -> bool:
    """Geometric means over seeds of a kind of rows, on one scale of colors."""
    trained = [v for v in run.variants if not v.untouched and any(getattr(c, kind) for c in run.done(v.name))]
    rows = {v.name: [_square_rows(c, kind) for c in run.done(v.name)] for v in trained}
    places = list(dict.fromkeys((r["height"], r[key]) for found in rows.values() for c in found for r in c))
    sizes = sorted({size for size, _ in places})
    if not places:
        return False
    grids = []
    for size in sizes:
        columns = [k for s, k in places if s == size]
        seen = [[_log_mean(rows[v.name], size, key, k, value) for k in columns] for v in trained]
        grids.append((size, columns, np.exp(np.array(seen, dtype=float))))
    finite = np.concatenate([g[np.isfinite(g) & (g > 0)] for _, _, g in grids])
    if not finite.size:
        return False
    most = min(float(finite.max()), WORTHLESS) if finite.min() < WORTHLESS else float(finite.max())
    norm = LogNorm(finite.min(), max(most, finite.min() * 1.01))
    beyond = finite.max() > norm.vmax
    wide = sum(len(columns) for _, columns, _ in grids)
    canvas = Figure(figsize=(3.2 + 0.5 * wide, 1.6 + 0.25 * len(trained)), layout="constrained")
    ratios = [len(columns) for _, columns, _ in grids]
    panels = canvas.subplots(1, len(grids), squeeze=False, sharey=True, width_ratios=ratios)[0]
    for axes, (size, columns, grid) in zip(panels, grids, strict=True):
        image = axes.imshow(grid, norm=norm, cmap=COLORS, aspect="auto")
        style.bare(axes)
        for place in _changes([v.mixer for v in trained]):
            axes.axhline(place - 0.5, color="white", linewidth=2.5)
        for place in _changes([told(c).split(" ")[0] for c in columns]) if kind == "sites" else []:
            axes.axvline(place - 0.5, color="white", linewidth=2.5)
        axes.set_xticks(range(len(columns)), [told(c) for c in columns], rotation=60, ha="right", fontsize=7)
        axes.set_title(f"{size} px")
    panels[0].set_yticks(range(len(trained)), [v.label for v in trained], fontsize=8)
    bar = canvas.colorbar(image, ax=panels, shrink=0.8, extend="max" if beyond else "neither")
    bar.set_label("relative error")
    style.plain_log(bar.ax)
    style.save(canvas, path)
    return True


def _changes(names: Sequence[object]) -> list[int]:
    """Where a name differs from the one before it."""
    return [k for k in range(1, len(names)) if names[k] != names[k - 1]]


def _square_rows(cell: Cell, kind: str) -> list[dict[str, Any]]:
    return [row for row in getattr(cell, kind) if row.get("height") == row.get("width")]


def _log_mean(cells: Sequence[list[dict[str, Any]]], size: int, key: str, place: Any, value: str) -> float:
    """Over cells; not a number where one has none, or none above zero."""
    found = [r[value] for c in cells for r in c if r["height"] == size and r[key] == place]
    if not found or any(v is None or v <= 0 for v in found):
        return np.nan
    return float(np.mean(np.log(found)))


def _short(site: str) -> str:
    """ "up_blocks.1.attentions.0.transformer_blocks.0.attn1" -> "up 1.0", with the block where there are several."""
    found = re.match(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?attentions\.(\d+)\.transformer_blocks\.(\d+)", site)
    if not found:
        return site
    place = ".".join(part for part in (found[2], found[3]) if part)
    return f"{found[1]} {place}" + (f" #{found[4]}" if found[4] != "0" else "")
