"""The page of the study of large images: pictures, what they took, and whether they stay one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from experiments.core.files import read_json
from experiments.report import style
from experiments.report.curves import exponent

Record = dict[str, Any]
NAMES = ("teacher", "normalized", "unnormalized")
LOOK = dict(zip(NAMES, (style.GRAY, *style.PALETTE[:2]), strict=True))
TWEMOJI = "Pictures of a model trained on Twemoji graphics © Twitter, Inc. and other contributors, CC-BY 4.0."


def count_areas(picture: Image.Image, side: int = 128, colors: int = 3) -> int:
    """How many areas of one color a picture has, seen at `side` pixels and in `colors` colors of its own.

    A picture that was made larger has as many as before; one that shows things twice has more, and noise has the most.
    An area counts where it is 3 pixels wide: the soft edge between two areas is not one of its own.
    """
    small = picture.convert("RGB").resize((side, side), Image.Resampling.BOX)
    which = torch.from_numpy(np.array(small.quantize(colors, Image.Quantize.MAXCOVERAGE)))
    return sum(len(_components(mask).unique()) - 1 for mask in (_eroded(which == color) for color in which.unique()))


def _eroded(mask: Tensor) -> Tensor:
    """(h, w) bool -> (h + 2, w + 2) bool: true where all nine pixels around are, and a rim that is false."""
    return ~F.max_pool2d((~F.pad(mask, (2, 2, 2, 2))).float()[None], 3, 1)[0].bool()


def _components(mask: Tensor) -> Tensor:
    """(h, w) bool -> (h, w): one number for each area whose pixels touch, corners included; 0 outside."""
    labels = torch.arange(1.0, mask.numel() + 1).view(mask.shape) * mask
    while True:  # the largest number of an area floods it
        flooded = F.max_pool2d(labels[None], 3, 1, 1)[0] * mask
        if flooded.equal(labels):
            return labels
        labels = flooded


def write_page(runs: Path, page: Path) -> None:
    """Write PAGE, and its figures beside it, from the records and pictures under RUNS."""
    page.parent.mkdir(parents=True, exist_ok=True)
    records = [{**read_json(path), "folder": path.parent} for path in sorted(runs.glob("*/record.json"))]
    with matplotlib.rc_context(style.RC):
        _ladder([r for r in records if r["mode"] == "progressive"], page.parent / "stages.png")
        _beside(records, page.parent / "direct_or_progressive.png")
        _growth(records, page.parent / "cost.png")
    page.write_text(_text(records), encoding="utf-8")


def _ladder(records: Sequence[Record], path: Path) -> None:
    """A row for each attention, a column for each stage: of the picture that was made the largest."""
    largest = max(r["size"] for r in records)
    seed = next(r["seed"] for r in records if r["size"] == largest)
    rows = sorted((r for r in records if r["seed"] == seed), key=lambda r: NAMES.index(r["name"]))
    sides = sorted({row["side"] for r in rows for row in r["stages"]})
    _grid(
        [[r["folder"] / f"{side}.png" for side in sides] for r in rows],
        [r["name"] for r in rows],
        [f"{side} px" for side in sides],
        path,
    )


def _beside(records: Sequence[Record], path: Path) -> None:
    """A row for each prompt; columns for each attention, direct and progressive, at the largest size all have."""
    size = max(r["size"] for r in records if r["mode"] == "direct")
    seeds = sorted({r["seed"] for r in records})
    found = {(r["seed"], r["name"], r["mode"]): r for r in records if r["mode"] == "direct" and r["size"] == size}
    found |= {(r["seed"], r["name"], r["mode"]): r for r in records if r["mode"] == "progressive" and r["size"] >= size}
    columns = [(name, mode) for mode in ("direct", "progressive") for name in NAMES]
    prompts = {r["seed"]: r["prompt"].replace(", ", ",\n") for r in records}
    made = {key: record["folder"] / f"{size}.png" for key, record in found.items()}
    cells = [[made.get((seed, *column)) for column in columns] for seed in seeds]
    _grid(cells, [prompts[s] for s in seeds], [f"{mode}:\n{name}" for name, mode in columns], path)


def _grid(cells: Sequence[Sequence[Path | None]], rows: Sequence[str], columns: Sequence[str], path: Path) -> None:
    canvas = Figure(figsize=(1.55 * len(columns) + 0.6, 1.62 * len(rows) + 0.3), layout="constrained")
    axes = canvas.subplots(len(rows), len(columns), squeeze=False)
    for paths, line, row in zip(cells, axes, rows, strict=True):
        for picture, axis in zip(paths, line, strict=True):
            style.bare(axis)
            if picture and picture.is_file():
                with Image.open(picture) as image:
                    axis.imshow(image.convert("RGB").resize((256, 256), Image.Resampling.LANCZOS))
        line[0].set_ylabel(row, fontsize=8)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column, fontsize=8)
    style.save(canvas, path, vector=False)


def _steps(records: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """By attention and tokens: the least seconds and bytes that a step took."""
    found: dict[str, dict[int, Record]] = {name: {} for name in NAMES}
    for record in records:
        for row in record["stages"]:
            step = {"seconds": row["seconds"] / row["steps"], "bytes": row["bytes"] or 0}
            tokens = (row["side"] // 4) ** 2
            known = found[record["name"]].setdefault(tokens, step)
            known |= {key: min(known[key], value) for key, value in step.items()}
    return found


def _growth(records: Sequence[Record], path: Path) -> None:
    """Time and memory of a step against tokens, with exponents over the three largest sizes."""
    canvas = Figure(figsize=(8.4, 3.4), layout="constrained")
    panels = canvas.subplots(1, 2).tolist()
    for axes, (key, scale, label) in zip(
        panels, (("seconds", 1, "seconds a step"), ("bytes", 2**20, "peak memory of a step (MiB)")), strict=True
    ):
        for name, steps in _steps(records).items():
            points = [(tokens, steps[tokens][key] / scale) for tokens in sorted(steps) if steps[tokens][key]]
            power = exponent(points)
            shown = f"{name}, tokens^{power:.2f}" if power is not None else name
            axes.plot(*zip(*points, strict=True), color=LOOK[name], marker="o", label=shown)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        style.plain_log(axes)
        axes.legend()
    style.save(canvas, path, vector=False)


def _text(records: Sequence[Record]) -> str:
    largest = max(records, key=lambda r: (r["size"], r["name"] == "normalized"))
    prompts = [prompt for _, prompt in sorted({(r["seed"], r["prompt"]) for r in records})]
    lines = [
        "# From 64 to 2048 pixels with one student",
        "",
        "The embedded model was trained at 64 px; its student is LinFusion's mixer, distilled at 64 px, with and",
        "without normalization. Every stage denoises the whole image. The command that makes this page:",
        "`python -m experiments.studies.large_images RUNS PAGE --normalized ADAPTER --raw ADAPTER`.",
        "",
        "![Every stage of the largest picture](stages.png)",
        "",
        f"{TWEMOJI} “{largest['prompt']}”, 20 steps; later stages run the last 0.4, 0.3, 0.2, 0.1, 0.1 of them.",
        "",
        "![Direct and progressive, side by side](direct_or_progressive.png)",
        "",
        "## Does the picture stay one?",
        "",
        "How many areas of one color a picture has, seen at 128 px and in three colors of its own: made larger, a",
        "picture keeps its number; one that shows things twice has more, and noise has the most. An area counts where",
        "it is 3 pixels wide. A number each for",
        f"{'; '.join(f'“{prompt}”' for prompt in prompts)}.",
        "",
        *_areas(records),
        "",
        "## Time and memory",
        "",
        "![Time and memory of a step against tokens](cost.png)",
        "",
        "A step is two calls of the UNet for guidance, float32, one thread; memory is the peak of the resident set",
        "above what was resident before the stage. *Foreseen* is the plan's time, from the rate measured at 128 px.",
        "",
        *_costs(largest),
        "",
    ]
    return "\n".join(lines)


def _areas(records: Sequence[Record]) -> list[str]:
    found: dict[tuple[str, str], dict[int, list[int]]] = {}
    for record in sorted(records, key=lambda r: int(r["seed"])):
        sides = found.setdefault((record["mode"], record["name"]), {})
        for row in record["stages"]:
            with Image.open(record["folder"] / f"{row['side']}.png") as picture:
                sides.setdefault(row["side"], []).append(count_areas(picture))
    columns = sorted({side for sides in found.values() for side in sides})
    head = ["| | | " + " | ".join(f"{side} px" for side in columns) + " |", "|---|---|" + "---|" * len(columns)]
    rows = []
    for (mode, name), sides in sorted(found.items(), key=lambda item: (item[0][0], NAMES.index(item[0][1]))):
        cells = (", ".join(map(str, sides.get(side, []))) for side in columns)
        rows.append(f"| {mode} | {name} | " + " | ".join(cells) + " |")
    return [*head, *rows]


def _costs(record: Record) -> list[str]:
    rows = ["| stage | tokens | steps | seconds | foreseen | peak memory, MiB |", "|---|---|---|---|---|---|"]
    for row in record["stages"]:
        cells = (
            f"{row['side']} px",
            f"{(row['side'] // 4) ** 2:,}",
            f"{row['steps']}",
            f"{row['seconds']:.1f}",
            f"{row['foreseen']:.1f}",
            f"{row['bytes'] / 2**20:,.0f}" if row["bytes"] else "–",
        )
        rows.append("| " + " | ".join(cells) + " |")
    return rows
