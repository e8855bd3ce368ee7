"""The figures of a compatibility run: grids of generated images, and bars with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from experiments.core.figures import GRAY, PALETTE, RC
from experiments.studies.compatibility.config import CompatibilityConfig
from experiments.studies.compatibility.controlnet import detect_edges
from experiments.studies.compatibility.run import load_images
from experiments.studies.compatibility.sampling import load_references

SPLITS = {"train": "held-in", "held_out": "held-out"}
PARTS = {"controlnet": "ControlNet", "ip_adapter": "IP-Adapter"}
GRID_ARMS = ("teacher+", "student+", "teacher")
COLUMNS = 5
"""Images of each split in a grid."""

_BARS = dict(zip(("teacher+", "student+", "teacher", "student"), PALETTE, strict=False))
BAR_COLORS = _BARS | {"teacher": "#9cc7e0", "student": "#f0b88a", "caption": "#b5b5b5", "ceiling": GRAY}

ImageColumn = tuple[str, list[np.ndarray]]
"""A caption and its images (s, s, 3) from top to bottom."""


def arm_labels(config: CompatibilityConfig, part: str) -> dict[str, str]:
    """Return the label of every arm, in the order of the page."""
    student = config.grid.variants[0].label
    name = PARTS[part]
    alone = "alone" if part == "controlnet" else "alone, no image"
    labels = {
        "teacher+": f"softmax + {name}",
        "student+": f"{student} + {name}",
        "teacher": f"softmax {alone}",
        "student": f"{student} {alone}",
    }
    if part == "ip_adapter":
        labels["caption"] = "softmax, from the caption instead"
    labels["ceiling"] = "reference, encoded and decoded"
    return labels


def draw_image_grid(directory: Path, config: CompatibilityConfig, part: str, size: int, path: Path) -> None:
    """Draw the condition and the images of three arms (rows) for images spread over both splits (columns)."""
    columns = [column for split in SPLITS for column in _split_columns(directory, config, part, split, size)]
    labels = arm_labels(config, part)
    titles = ["edges given" if part == "controlnet" else "image given", *(labels[arm] for arm in GRID_ARMS)]
    figure = Figure(figsize=(1.6 + 0.8 * len(columns), 0.45 + 0.8 * len(titles)))
    axes = figure.subplots(len(titles), len(columns), squeeze=False)
    left = 1.55 / figure.get_figwidth()
    top = 1 - 0.4 / figure.get_figheight()
    figure.subplots_adjust(left=left, right=0.998, bottom=0.005, top=top, wspace=0.04, hspace=0.04)
    for column, (caption, images) in enumerate(columns):
        name, _, background = caption.partition(", ")
        axes[0, column].set_title(f"{name[:17]}\n{background}", fontsize=5)
        for row, image in enumerate(images):
            axes[row, column].imshow(image, interpolation="nearest")
            axes[row, column].set(xticks=[], yticks=[])
    for row, title in enumerate(titles):
        axes[row, 0].set_ylabel(title.replace(" + ", " +\n"), rotation=0, ha="right", va="center", fontsize=7)
    figure.savefig(path, dpi=160, metadata={"Software": None})


def _split_columns(directory: Path, config: CompatibilityConfig, part: str, split: str, size: int) -> list[ImageColumn]:
    count = config.sampling.images
    references = load_references(config.grid.data, split, size, count)
    condition = references.images
    if part == "controlnet":
        condition = 1 - 2 * detect_edges(references.images).expand(-1, 3, -1, -1)
    rows = [condition, *(load_images(directory, part, references, arm) for arm in GRID_ARMS)]
    indices = sorted(set(np.linspace(0, count - 1, min(COLUMNS, count)).astype(int).tolist()))
    return [(references.captions[k], [_to_pixels(row[k]) for row in rows]) for k in indices]


def _to_pixels(image: Tensor) -> np.ndarray:
    """Turn an image (3, s, s) in [-1, 1] into 8-bit pixels (s, s, 3)."""
    pixels: np.ndarray = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return pixels


def draw_bars(result: dict[str, Any], config: CompatibilityConfig, path: Path) -> None:
    """Draw means with 95 % intervals: a panel per part and size, a group of bars per split."""
    sizes = config.sampling.sizes
    panels = [*(("controlnet", size) for size in sizes), ("ip_adapter", sizes[0])]
    with rc_context(RC):
        figure = Figure(figsize=(3.5 * len(panels), 3.5), layout="constrained")
        for axes, (part, size) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            rows = [row for row in result[part] if row["size"] == size]
            _draw_bar_groups(axes, rows, arm_labels(config, part))
            axes.set_title(f"{PARTS[part]}, {size} px", fontsize=9)
            axes.set_ylabel("edge agreement (F1)" if part == "controlnet" else "CLIP similarity (cosine)")
        figure.savefig(path, dpi=130, metadata={"Software": None})


def _draw_bar_groups(axes: Axes, rows: list[dict[str, Any]], labels: dict[str, str]) -> None:
    width = 0.85 / len(labels)
    for number, (arm, label) in enumerate(labels.items()):
        intervals = [row["arms"][arm] for row in rows]
        means = [i["mean"] for i in intervals]
        below = [i["mean"] - i["low"] for i in intervals]
        above = [i["high"] - i["mean"] for i in intervals]
        positions = [group + (number - (len(labels) - 1) / 2) * width for group in range(len(rows))]
        axes.bar(positions, means, width, yerr=[below, above], color=BAR_COLORS[arm], label=label, error_kw={"lw": 0.8})
    axes.set_xticks(range(len(rows)), [f"{SPLITS[row['split']]} images" for row in rows])
    axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
