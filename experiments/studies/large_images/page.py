"""The page of the study of large images: figures, the number of areas, time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from experiments.core.files import read_json
from experiments.studies.large_images.areas import count_areas
from experiments.studies.large_images.figures import NAMES, ImageRecord, draw_figures

CREDIT = "Images of a model trained on Twemoji graphics © Twitter, Inc. and other contributors, CC-BY 4.0."


def write_page(runs: Path, page: Path) -> None:
    """Write `page`, and its figures beside it, from the records and images under `runs`."""
    page.parent.mkdir(parents=True, exist_ok=True)
    records = [{**read_json(path), "folder": path.parent} for path in sorted(runs.glob("*/record.json"))]
    draw_figures(records, page.parent)
    page.write_text(_text(records), encoding="utf-8")


def _text(records: Sequence[ImageRecord]) -> str:
    largest = max(records, key=lambda r: (r["size"], r["name"] == "normalized"))
    prompts = [prompt for _, prompt in sorted({(r["seed"], r["prompt"]) for r in records})]
    lines = [
        "# From 64 to 2048 pixels with one student",
        "",
        "The embedded model was trained at 64 px; its student has LinFusion's mixer, distilled at 64 px, with and",
        "without normalization. Every stage denoises the whole image. This command writes the page:",
        "`python -m experiments.studies.large_images RUNS PAGE --normalized ADAPTER --unnormalized ADAPTER`.",
        "",
        "![Every stage of the largest image](stages.png)",
        "",
        f"{CREDIT} Prompt: “{largest['prompt']}”; 20 steps; the later stages run the last 0.4, 0.3, 0.2, 0.1 and 0.1",
        "of them.",
        "",
        "![Direct and progressive generation of the same prompts](direct_or_progressive.png)",
        "",
        "## Does the image keep showing one object?",
        "",
        "The table counts the areas of one color in each image, reduced to 128 px and to three of its own colors.",
        "Upscaling an image keeps the number; an image that repeats its objects has more, and noise has the most. An",
        "area counts if it is at least 3 pixels wide. The numbers of a cell are those of the prompts",
        f"{', '.join(f'“{prompt}”' for prompt in prompts)}.",
        "",
        *_area_table(records),
        "",
        "## Time and memory",
        "",
        "![Time and memory of a step against tokens](cost.png)",
        "",
        "A step is two calls of the UNet (guidance), in float32, on one thread; memory is the growth of the resident",
        "set's peak during the stage. The estimate is the plan's time, from the throughput measured at 128 px.",
        "",
        *_cost_table(largest),
        "",
    ]
    return "\n".join(lines)


def _area_table(records: Sequence[ImageRecord]) -> list[str]:
    counts: dict[tuple[str, str], dict[int, list[int]]] = {}
    for record in sorted(records, key=lambda r: int(r["seed"])):
        by_side = counts.setdefault((record["mode"], record["name"]), {})
        for stage in record["stages"]:
            with Image.open(record["folder"] / f"{stage['side']}.png") as image:
                by_side.setdefault(stage["side"], []).append(count_areas(image))
    sides = sorted({side for by_side in counts.values() for side in by_side})
    lines = ["| | | " + " | ".join(f"{side} px" for side in sides) + " |", "|---|---|" + "---|" * len(sides)]
    for (mode, name), by_side in sorted(counts.items(), key=lambda item: (item[0][0], NAMES.index(item[0][1]))):
        cells = (", ".join(map(str, by_side.get(side, []))) for side in sides)
        lines.append(f"| {mode} | {name} | " + " | ".join(cells) + " |")
    return lines


def _cost_table(record: ImageRecord) -> list[str]:
    lines = [
        "| stage | tokens | steps | seconds | estimated seconds | peak memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for stage in record["stages"]:
        cells = (
            f"{stage['side']} px",
            f"{(stage['side'] // 4) ** 2:,}",
            f"{stage['steps']}",
            f"{stage['seconds']:.1f}",
            f"{stage['estimated_seconds']:.1f}",
            f"{stage['bytes'] / 2**20:,.0f}" if stage["bytes"] else "–",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines
