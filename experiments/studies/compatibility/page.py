"""The report of a compatibility run: one Markdown page with its figures, built from the run's files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from experiments.core.files import write_text
from experiments.data.emoji import LICENSE
from experiments.studies.compatibility.config import CompatibilityConfig
from experiments.studies.compatibility.figures import PARTS, SPLITS, arm_labels, draw_bars, draw_image_grid
from experiments.studies.compatibility.measure import MeanInterval

LIMITS = """## What this cannot show

- The teacher is tiny; its model card says how much of what it draws can be recognized. The ControlNet gives it
  outlines but no inner detail; thin strokes are lost under softmax as well. The IP-Adapter transfers the colors
  and the coarse shape of an image, not the drawing. Judge the differences, not the images.
- Unrelated images agree by chance too: read agreement relative to the rows without the ControlNet, not to 0. Chance
  is lower at twice the resolution, where the same tolerance of one pixel is half as wide.
- A drawing that its background hides has no edges; its agreement is 0 or 1, and it is counted.
- The autoencoder blurs weak edges away, which no model can repair: the last row of a table is the ceiling.
- At these sizes the largest self-attention has a few hundred to a thousand tokens: this is about compatibility, not
  speed.
"""

METHOD = """\
Edges: Sobel's magnitude, its maximum over the color channels, above a fifth of the range. Agreement: F1 with
one pixel of tolerance, at every size. Similarity: cosine of the embeddings of the small CLIP that judges the teacher,
which is also the IP-Adapter's image encoder, so similarity is judged by the model that it was trained on. The
IP-Adapter generates from the empty caption; before it is trained, its projection is the least-squares map
from embeddings to text states.
"""


def write_page(directory: Path, page: Path) -> Path:
    """Write the page of a run.

    Args:
        directory: of the run.
        page: path of the Markdown file; the figures go into a folder of the same name beside it.

    Returns:
        The path of the page.
    """
    result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    config = CompatibilityConfig.model_validate(result["config"])
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for size in config.sampling.sizes:
        draw_image_grid(directory, config, "controlnet", size, folder / f"controlnet_{size}.png")
    draw_image_grid(directory, config, "ip_adapter", config.sampling.sizes[0], folder / "ip_adapter.png")
    draw_bars(result, config, folder / "bars.png")
    write_text(page, format_page(result, config, folder.name))
    return page


def print_summary(result: dict[str, Any], console: Console) -> None:
    """Print the means and the paired differences as a table."""
    config = CompatibilityConfig.model_validate(result["config"])
    student = config.grid.variants[0].label
    headers = ("softmax + it", f"{student} + it", "difference [95 %]", "softmax alone", f"{student} alone")
    table = Table(Column("part", no_wrap=True), "px", "images", *headers)
    for part, name in PARTS.items():
        for row in result[part]:
            means = {arm: f"{interval['mean']:.3f}" for arm, interval in row["arms"].items()}
            difference = _format_signed(row["student_minus_teacher"])
            numbers = (means["teacher+"], means["student+"], difference, means["teacher"], means["student"])
            table.add_row(name, str(row["size"]), SPLITS[row["split"]], *numbers)
    console.print(table)
    console.print("ControlNet: edge agreement (F1). IP-Adapter: CLIP similarity to the given image.", soft_wrap=True)


def format_page(result: dict[str, Any], config: CompatibilityConfig, folder: str) -> str:
    """Return the text of the page.

    Args:
        result: as `run_compatibility` returns it.
        config: of the run.
        folder: name of the folder of the figures.
    """
    student = config.grid.variants[0].label
    findings = [_format_finding(row, part, student) for part in PARTS for row in result[part]]
    checks = [f"Checked bitwise: {what}: {'yes' if holds else '**no**'}." for what, holds in result["checks"].items()]
    lines = [
        f"# ControlNet and IP-Adapter under {student}, without adaptation",
        "",
        "The claim under test (2409.02097): a part that was trained for the softmax model works unchanged with the "
        "distilled one. All three parts were trained separately with the softmax UNet of the embedded teacher: the "
        "student by text-conditional distillation alone, the ControlNet and the IP-Adapter with the teacher's own "
        "objective. None of them has seen another.",
        "",
        "## Finding",
        "",
        *(f"- {finding}" for finding in findings),
        "",
        *(f"- {check}" for check in checks),
        "",
        f"![Edge agreement and similarity, means with intervals]({folder}/bars.png)",
        "",
    ]
    for size in config.sampling.sizes:
        was_distilled = size in config.grid.distillation.all_sizes
        note = f"a size that the student was {'' if was_distilled else 'not '}distilled at"
        lines += _format_table(result, config, "controlnet", size, f"ControlNet at {size} px, {note}", folder)
    size = config.sampling.sizes[0]
    lines += _format_table(result, config, "ip_adapter", size, f"IP-Adapter at {size} px", folder)
    lines += _format_method(result, config)
    lines += [LIMITS, "`mixlab compatibility --out DIR` runs the study and continues a stopped run.", ""]
    return "\n".join(lines)


def _format_method(result: dict[str, Any], config: CompatibilityConfig) -> list[str]:
    sampling = config.sampling
    student = config.grid.variants[0].label
    parts = {
        student: (config.grid.distillation.fit, "student"),
        "edge ControlNet": (config.controlnet, "ControlNet"),
        "IP-Adapter": (config.ip_adapter, "IP-Adapter"),
    }
    counts = result["parameters"]
    return [
        "## How it was measured",
        "",
        f"{sampling.images} images of each split, spread evenly, with backgrounds, positions and scales that no "
        f"training used. Held-in drawings were in the training set, held-out ones were not. {sampling.steps} sampling "
        f"steps, guidance {sampling.guidance:g}, the same noise for image k in every row. Intervals: 95 % bootstrap "
        "over images; "
        "differences are paired, image by image. Each part was trained once: the intervals do not cover the variation "
        "between trainings.",
        "",
        METHOD,
        "| part | parameters | steps | batch |",
        "|---|---|---|---|",
        *(f"| {n} | {counts[key]:,} | {fit.steps} | {fit.batch_size} |" for n, (fit, key) in parts.items()),
        "",
    ]


def _format_finding(row: dict[str, Any], part: str, student: str) -> str:
    name = PARTS[part]
    difference = row["student_minus_teacher"]
    effect = row["effect"]
    if effect["teacher"]["low"] <= 0:
        verdict = f"the {name} has no clear effect on the softmax model itself, so there is no effect to keep"
    else:
        verdict = (
            f"the {name} adds {_format_signed(effect['teacher'])} under softmax and "
            f"{_format_signed(effect['student'])} under {student}: "
            f"{100 * row['effect_kept']:.0f} % of the effect is kept"
        )
    comparison = "not distinguishable from"
    if difference["high"] < 0:
        comparison = "worse than"
    elif difference["low"] > 0:
        comparison = "better than"
    return (
        f"**{name}, {row['size']} px, {SPLITS[row['split']]}:** {verdict}. With it, {student} is {comparison} "
        f"softmax: difference {_format_signed(difference)}."
    )


def _format_table(
    result: dict[str, Any], config: CompatibilityConfig, part: str, size: int, title: str, folder: str
) -> list[str]:
    rows = [row for row in result[part] if row["size"] == size]
    student = config.grid.variants[0].label
    image = f"{folder}/controlnet_{size}.png" if part == "controlnet" else f"{folder}/ip_adapter.png"
    measure = "Edge agreement (F1)" if part == "controlnet" else "CLIP similarity to the given image"
    differences = [_format_signed(row["student_minus_teacher"]) for row in rows]
    return [
        f"## {title}",
        "",
        f"| {measure} | " + " | ".join(SPLITS[row["split"]] for row in rows) + " |",
        "|---|" + "---|" * len(rows),
        *(
            f"| {label} | " + " | ".join(_format_interval(row["arms"][arm]) for row in rows) + " |"
            for arm, label in arm_labels(config, part).items()
        ),
        f"| **{student} − softmax, both with {PARTS[part]}** | " + " | ".join(differences) + " |",
        "",
        f"![What {PARTS[part]} does under softmax and under {student}, {size} px]({image})",
        "",
        f"*Left half: held-in, right half: held-out; not selected. {LICENSE}*",
        "",
    ]


def _format_interval(interval: MeanInterval) -> str:
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _format_signed(interval: MeanInterval) -> str:
    return f"{interval['mean']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"
