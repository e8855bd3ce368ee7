"""The page of a compatibility run: one Markdown file with its pictures, from the run's files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from torch import Tensor

from experiments.core.figures import GRAY, PALETTE, RC
from experiments.report.image_grids import LICENSE
from experiments.studies.compatibility import run
from experiments.studies.compatibility.controlnet import edges
from experiments.studies.compatibility.measure import Scene, scene

SPLITS = {"train": "held-in", "held_out": "held-out"}
LIMITS = (
    "## What this cannot show",
    "",
    "- The teacher is tiny (2.45 M parameters, 64 px, emoji): alone it draws what a person would recognize about one "
    "time in three, and a held-out name tells it little. The ControlNet gives it outlines, not inner detail; thin "
    "strokes and letters are lost under softmax as well. The IP-Adapter brings the colors and the coarse shape of a "
    "picture, not its drawing. Judge the differences, not the pictures.",
    "- Unrelated emoji agree by chance too: read agreement from the rows without the ControlNet upwards, not from 0. "
    "Chance is lower at twice the resolution, where the same tolerance of one pixel is half as wide.",
    "- An emoji that its background hides has no edges; its agreement is all or nothing, and it is counted.",
    "- The autoencoder blurs weak edges away, which no model can make good: the last row of a table is the ceiling.",
    "- At these sizes the largest self-attention has a few hundred to a thousand tokens: this is about "
    "compatibility, not speed.",
    "",
)
COLUMNS = 5  # pictures of each split in a grid
PARTS = {"controlnet": "ControlNet", "ip_adapter": "IP-Adapter"}


def write_page(directory: Path, page: Path) -> Path:
    """Write `page` and its pictures, in a folder beside it of the same name, from the run in `directory`."""
    record = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    plan = run.Plan.model_validate(record["plan"])
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for size in plan.sampling.sizes:
        _grid(directory, plan, "controlnet", size, folder / f"controlnet_{size}.png")
    _grid(directory, plan, "ip_adapter", plan.sampling.sizes[0], folder / "ip_adapter.png")
    _bars(record, plan, folder / "bars.png")
    page.write_text(_text(record, plan, folder.name), encoding="utf-8")
    return page


def show(record: dict[str, Any], console: Console) -> None:
    """Print the means and paired differences as a table."""
    plan = run.Plan.model_validate(record["plan"])
    student = plan.grid.variants[0].label
    with_it, alone = ("softmax + it", f"{student} + it"), ("softmax alone", f"{student} alone")
    table = Table(Column("part", no_wrap=True), "px", "emoji", *with_it, "difference [95 %]", *alone)
    for part, name in PARTS.items():
        for row in record[part]:
            means = {arm: f"{found['mean']:.3f}" for arm, found in row["arms"].items()}
            apart = escape(_signed(row["student_minus_teacher"]))
            numbers = (means["teacher+"], means["student+"], apart, means["teacher"], means["student"])
            table.add_row(name, str(row["size"]), SPLITS[row["split"]], *numbers)
    console.print(table)
    console.print("ControlNet: edge agreement (F1). IP-Adapter: CLIP likeness to the picture given.", soft_wrap=True)


def labels(plan: run.Plan, part: str) -> dict[str, str]:
    """What each row is called, in the order of the page."""
    student, extra = plan.grid.variants[0].label, PARTS[part]
    alone = "alone" if part == "controlnet" else "alone, no picture"
    rows = {
        "teacher+": f"softmax + {extra}",
        "student+": f"{student} + {extra}",
        "teacher": f"softmax {alone}",
        "student": f"{student} {alone}",
    }
    if part == "ip_adapter":
        rows["caption"] = "softmax, told the caption instead"
    return rows | {"ceiling": "truth, encoded and decoded"}


def _grid(directory: Path, plan: run.Plan, part: str, size: int, path: Path) -> None:
    """Rows: condition, both models with the part, teacher without; columns: spread over both splits, unpicked."""
    names, blocks = labels(plan, part), []
    for split in SPLITS:
        real = scene(plan.grid.data, split, size, plan.sampling.pictures)
        shown = _spread(plan.sampling.pictures)
        given = 1 - 2 * edges(real.images).expand(-1, 3, -1, -1) if part == "controlnet" else real.images
        rows = [given, *(run.load_pictures(directory, part, real, arm) for arm in ("teacher+", "student+", "teacher"))]
        blocks.append([_column_of(rows, real, k) for k in shown])
    columns = [column for block in blocks for column in block]
    titles = ["edges given" if part == "controlnet" else "picture given"]
    titles += [names[arm] for arm in ("teacher+", "student+", "teacher")]
    canvas = Figure(figsize=(1.6 + 0.8 * len(columns), 0.45 + 0.8 * len(titles)))
    axes = canvas.subplots(len(titles), len(columns), squeeze=False)
    left, top = 1.55 / canvas.get_figwidth(), 1 - 0.4 / canvas.get_figheight()
    canvas.subplots_adjust(left=left, right=0.998, bottom=0.005, top=top, wspace=0.04, hspace=0.04)
    for k, (caption, pictures) in enumerate(columns):
        name, _, background = caption.partition(", ")
        axes[0, k].set_title(f"{name[:17]}\n{background}", fontsize=5)
        for row, picture in enumerate(pictures):
            axes[row, k].imshow(picture, interpolation="nearest")
            axes[row, k].set(xticks=[], yticks=[])
    for row, title in enumerate(titles):
        axes[row, 0].set_ylabel(title.replace(" + ", " +\n"), rotation=0, ha="right", va="center", fontsize=7)
    canvas.savefig(path, dpi=160, metadata={"Software": None})


def _column_of(rows: list[Tensor], real: Scene, k: int) -> tuple[str, list[np.ndarray]]:
    pixels = [((r[k].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy() for r in rows]
    return real.captions[k], pixels


def _spread(pictures: int) -> list[int]:
    return sorted(set(np.linspace(0, pictures - 1, min(COLUMNS, pictures)).astype(int).tolist()))


def _bars(record: dict[str, Any], plan: run.Plan, path: Path) -> None:
    """Means with 95 % intervals; a panel per part and size, a group of bars per split."""
    panels = [("controlnet", size) for size in plan.sampling.sizes] + [("ip_adapter", plan.sampling.sizes[0])]
    colors = dict(zip(("teacher+", "student+", "teacher", "student"), PALETTE, strict=False))
    colors |= {"teacher": "#9cc7e0", "student": "#f0b88a", "caption": "#b5b5b5", "ceiling": GRAY}
    import matplotlib

    with matplotlib.rc_context(RC):
        canvas = Figure(figsize=(3.5 * len(panels), 3.5), layout="constrained")
        for axes, (part, size) in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            names = labels(plan, part)
            rows = [r for r in record[part] if r["size"] == size]
            width = 0.85 / len(names)
            for number, (arm, name) in enumerate(names.items()):
                found = [row["arms"][arm] for row in rows]
                means = [f["mean"] for f in found]
                reach = [[f["mean"] - f["low"] for f in found], [f["high"] - f["mean"] for f in found]]
                places = [g + (number - (len(names) - 1) / 2) * width for g in range(len(rows))]
                axes.bar(places, means, width, yerr=reach, color=colors[arm], label=name, error_kw={"lw": 0.8})
            axes.set_xticks(range(len(rows)), [f"{SPLITS[row['split']]} emoji" for row in rows])
            axes.set_title(f"{PARTS[part]}, {size} px", fontsize=9)
            axes.set_ylabel("edge agreement (F1)" if part == "controlnet" else "CLIP likeness (cosine)")
            axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
        canvas.savefig(path, dpi=130, metadata={"Software": None})


def _text(record: dict[str, Any], plan: run.Plan, folder: str) -> str:
    student, s = plan.grid.variants[0].label, plan.sampling
    fitted = plan.grid.distillation
    trained = {
        student: (fitted.fit, "student"),
        "edge ControlNet": (plan.controlnet, "ControlNet"),
        "IP-Adapter": (plan.ip_adapter, "IP-Adapter"),
    }
    lines = [
        f"# ControlNet and IP-Adapter under {student}, without adaptation",
        "",
        "The claim measured (2409.02097): what was trained for the softmax model works under the distilled one as it "
        "is. All three parts were trained apart, each against the softmax UNet of the embedded teacher: the student "
        "by text-conditional distillation alone, the ControlNet and the IP-Adapter with the teacher's own objective. "
        "None has seen another.",
        "",
        "## Finding",
        "",
        *(f"- {_finding(row, part, student)}" for part in PARTS for row in record[part]),
        "",
        *(f"- Checked bitwise: {what}: {'yes' if true else '**no**'}." for what, true in record["trace"].items()),
        "",
        f"![Edge agreement and likeness, means with intervals]({folder}/bars.png)",
        "",
    ]
    for size in s.sizes:
        note = "the size trained on" if size == fitted.image_size else "a size that nothing was trained at"
        lines += _table(record, plan, "controlnet", size, f"ControlNet at {size} px, {note}", folder)
    lines += _table(record, plan, "ip_adapter", s.sizes[0], f"IP-Adapter at {s.sizes[0]} px", folder)
    lines += [
        "## How it was measured",
        "",
        f"{s.pictures} emoji of each split, spread evenly, on backgrounds, places and scales that no training drew. "
        f"Held-in drawings were in the training set, held-out ones in none. {s.steps} DDIM steps, guidance "
        f"{s.guidance:g}, the same noise for picture k in every row. Intervals: 95 % bootstrap over pictures; "
        "differences are paired, picture by picture. One training run of each part: the intervals say nothing about "
        "other runs.",
        "",
        "Edges: Sobel's magnitude, the largest over the color channels, above a fifth of the range. Agreement: F1 "
        "with one pixel of tolerance, at every size. Likeness: cosine of the embeddings of the teacher's own small "
        "CLIP, which is also the IP-Adapter's image encoder, so that likeness is judged by what it was trained on. The "
        "IP-Adapter draws from the empty caption; its projection starts as the least-squares map from embeddings to "
        "text states, before it is trained.",
        "",
        "| part | parameters | steps | batch |",
        "|---|---|---|---|",
        *(f"| {n} | {record['parameters'][k]:,} | {c.steps} | {c.batch_size} |" for n, (c, k) in trained.items()),
        "",
        *LIMITS,
        "`mixlab compatibility --out DIR` runs it all; stopped and started again, it goes on.",
        "",
    ]
    return "\n".join(lines)


def _finding(row: dict[str, Any], part: str, student: str) -> str:
    apart, effect = row["student_minus_teacher"], row["effect"]
    if effect["teacher"]["low"] <= 0:
        verdict = f"the {PARTS[part]} has no clear effect on the softmax model itself, so there is nothing to keep"
    else:
        kept = f"the {PARTS[part]} adds {_signed(effect['teacher'])} under softmax and {_signed(effect['student'])} "
        verdict = f"{kept}under {student}: {100 * row['effect_kept']:.0f} % of the effect is kept"
    sense = "worse than" if apart["high"] < 0 else "better than" if apart["low"] > 0 else "not told apart from"
    return (
        f"**{PARTS[part]}, {row['size']} px, {SPLITS[row['split']]}:** {verdict}. With it, {student} is {sense} "
        f"softmax: difference {_signed(apart)}."
    )


def _signed(v: dict[str, float]) -> str:
    return f"{v['mean']:+.3f} [{v['low']:+.3f}, {v['high']:+.3f}]"


def _table(record: dict[str, Any], plan: run.Plan, part: str, size: int, title: str, folder: str) -> list[str]:
    rows = [r for r in record[part] if r["size"] == size]
    student = plan.grid.variants[0].label
    picture = f"{folder}/controlnet_{size}.png" if part == "controlnet" else f"{folder}/ip_adapter.png"
    what = "Edge agreement (F1)" if part == "controlnet" else "CLIP likeness to the picture given"
    lines = [f"## {title}", "", f"| {what} | " + " | ".join(SPLITS[r["split"]] for r in rows) + " |"]
    lines.append("|---|" + "---|" * len(rows))
    for arm, name in labels(plan, part).items():
        values = (r["arms"][arm] for r in rows)
        lines.append(
            f"| {name} | " + " | ".join(f"{v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for v in values) + " |"
        )
    apart = (_signed(r["student_minus_teacher"]) for r in rows)
    lines.append(f"| **{student} − softmax, both with {PARTS[part]}** | " + " | ".join(apart) + " |")
    alt = f"What {PARTS[part]} does under softmax and under {student}, {size} px"
    return [
        *lines,
        "",
        f"![{alt}]({picture})",
        "",
        f"*Left half: held-in, right half: held-out; unpicked. {LICENSE}*",
        "",
    ]
