"""The figures of the study of large images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from experiments.core.figures import GRAY, PALETTE, RC
from experiments.report import style
from experiments.report.line_plots import growth_exponent

ImageRecord = Mapping[str, Any]
"""What `study.make_image` writes for one image, with the folder it was read from."""

NAMES = ("teacher", "normalized", "unnormalized")
COLORS = dict(zip(NAMES, (GRAY, *PALETTE[:2]), strict=True))


def draw_figures(records: Sequence[ImageRecord], folder: Path) -> None:
    """Write `stages.png`, `direct_or_progressive.png` and `cost.png`."""
    with matplotlib.rc_context(RC):
        _draw_stages([r for r in records if r["mode"] == "progressive"], folder / "stages.png")
        _draw_modes(records, folder / "direct_or_progressive.png")
        _draw_costs(records, folder / "cost.png")


def _draw_stages(records: Sequence[ImageRecord], path: Path) -> None:
    """Draw every stage of the largest image, one row per attention."""
    largest = max(record["size"] for record in records)
    seed = next(record["seed"] for record in records if record["size"] == largest)
    rows = sorted((r for r in records if r["seed"] == seed), key=lambda r: NAMES.index(r["name"]))
    sides = sorted({stage["side"] for record in rows for stage in record["stages"]})
    _draw_grid(
        [[record["folder"] / f"{side}.png" for side in sides] for record in rows],
        [record["name"] for record in rows],
        [f"{side} px" for side in sides],
        path,
    )


def _draw_modes(records: Sequence[ImageRecord], path: Path) -> None:
    """Draw one row per prompt, and columns for every attention, direct and progressive, at the largest common size."""
    size = max(record["size"] for record in records if record["mode"] == "direct")
    images = {}
    for record in records:
        if record["size"] == size or (record["mode"] == "progressive" and record["size"] >= size):
            images[record["seed"], record["name"], record["mode"]] = record["folder"] / f"{size}.png"
    columns = [(name, mode) for mode in ("direct", "progressive") for name in NAMES]
    prompts = {record["seed"]: record["prompt"].replace(", ", ",\n") for record in records}
    seeds = sorted(prompts)
    _draw_grid(
        [[images.get((seed, *column)) for column in columns] for seed in seeds],
        [prompts[seed] for seed in seeds],
        [f"{mode}:\n{name}" for name, mode in columns],
        path,
    )


def _draw_grid(
    cells: Sequence[Sequence[Path | None]], row_labels: Sequence[str], column_labels: Sequence[str], path: Path
) -> None:
    canvas = Figure(figsize=(1.55 * len(column_labels) + 0.6, 1.62 * len(row_labels) + 0.3), layout="constrained")
    grid = canvas.subplots(len(row_labels), len(column_labels), squeeze=False)
    for image_paths, row, label in zip(cells, grid, row_labels, strict=True):
        for image_path, axes in zip(image_paths, row, strict=True):
            style.remove_frame(axes)
            if image_path and image_path.is_file():
                with Image.open(image_path) as image:
                    axes.imshow(image.convert("RGB").resize((256, 256), Image.Resampling.LANCZOS))
        row[0].set_ylabel(label, fontsize=8)
    for axes, label in zip(grid[0], column_labels, strict=True):
        axes.set_title(label, fontsize=8)
    style.save_figure(canvas, path, vector=False)


def _minimum_step_costs(records: Sequence[ImageRecord]) -> dict[str, dict[int, dict[str, float]]]:
    """Return the least seconds and bytes of a step, by attention and number of tokens."""
    costs: dict[str, dict[int, dict[str, float]]] = {name: {} for name in NAMES}
    for record in records:
        for stage in record["stages"]:
            step = {"seconds": stage["seconds"] / stage["steps"], "bytes": stage["bytes"] or 0}
            least = costs[record["name"]].setdefault((stage["side"] // 4) ** 2, step)
            least.update({key: min(least[key], value) for key, value in step.items()})
    return costs


def _draw_costs(records: Sequence[ImageRecord], path: Path) -> None:
    """Draw time and memory of a step against tokens, with exponents over the three largest sizes."""
    costs = _minimum_step_costs(records)
    canvas = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = canvas.subplots(1, 2)
    panels = ((left, "seconds", 1, "seconds per step"), (right, "bytes", 2**20, "peak memory of a step (MiB)"))
    for axes, key, unit, axis_label in panels:
        for name, steps in costs.items():
            points = [(tokens, steps[tokens][key] / unit) for tokens in sorted(steps) if steps[tokens][key]]
            power = growth_exponent(points)
            label = name if power is None else f"{name}, tokens^{power:.2f}"
            axes.plot(*zip(*points, strict=True), color=COLORS[name], marker="o", label=label)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=axis_label)
        style.use_plain_log_labels(axes)
        axes.legend()
    style.save_figure(canvas, path, vector=False)
