"""The figures, as PNG and SVG files; each comes with a caption that says what to see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib import rc_context
from PIL import Image

from experiments.report import curves, heat, pictures, points, style
from experiments.report.effects import Effect
from experiments.report.records import Run

KEY = "Solid: normalized; dashed: not. Circle: non-causal; triangle: causal; diamond: bidirectional."
BAND = f"{KEY} Line: mean over seeds; band: smallest to largest."
GROWTH = "The number is the growth exponent over the three largest sizes: 1 is linear in tokens, 2 quadratic."


Plan = tuple[str, str, Callable[[Path], bool], str, str]
"""kind, name, what draws it, alt text, caption"""


@dataclass(frozen=True)
class Figure:
    """A picture of the report."""

    kind: str
    path: Path
    caption: str
    alt: str

    @property
    def width(self) -> int:
        """In CSS pixels: letters as large as the page's small ones."""
        with Image.open(self.path) as image:
            return round(image.width * 96 / style.DPI)


def draw_all(run: Run, found: list[Effect], directory: Path) -> list[Figure]:
    """Draw every figure for which there is data into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in (*directory.glob("*.png"), *directory.glob("*.svg")):
        old.unlink()
    with rc_context(style.RC):
        return [
            Figure(kind, directory / f"{name}.png", caption, alt)
            for kind, name, draw, alt, caption in (*_numbers(run, found), *_pictures(run))
            if draw(directory / f"{name}.png")
        ]


def _numbers(run: Run, found: list[Effect]) -> Iterator[Plan]:
    """Those that show numbers."""
    flat = "A line that stays flat carries over to resolutions never trained on; one that rises does not."
    yield (
        *("effects", "effects", partial(points.effects, run, found), "Ratio of errors by factor and size"),
        "What each factor does to the error to the teacher. Stroke: geometric mean over pairs of rows that differ in "
        "it alone; bar: 95 % bootstrap interval over seeds; gray: the interval holds 1. Markers: the pairs; where they "
        "lie on both sides of 1, the effect depends on the other factors.",
    )
    teacher, truth = "Error to the teacher", "Error to the truth over the teacher's own (1: as good as it)"
    for name, metric, what in (
        ("error_to_teacher", "relative_error_to_teacher", teacher),
        ("error_ratio", "error_ratio", truth),
    ):
        draw = partial(curves.against_size, run, metric)
        alt = f"{what} against resolution, one line per variant"
        yield "error", name, draw, alt, f"{what} against resolution. {flat} {BAND}"
    yield (
        *("pareto", "pareto", partial(points.pareto, run), "Error against time and against state size"),
        "Quality against cost: error at the largest size, and time and state of one forward pass at the largest size "
        "timed. Down and left is better; nothing beats the rows on the gray steps in both.",
    )
    yield (
        *("sites", "sites", partial(heat.sites, run), "Error of every site of the UNet, rows: variants"),
        "Error of each self-attention layer's output in the student's own flow, from the way down (left) to the way up "
        "(right); layers are named by block and place. Errors add up along the flow. 1 is as wrong as an output of "
        "zeros; red: beyond it.",
    )
    yield (
        *("timesteps", "timesteps", partial(heat.timesteps, run), "Error at every timestep, rows: variants"),
        "Error to the teacher by timestep; at high timesteps the picture is nearly noise. Red: 1 and more, as wrong as "
        "a prediction of zeros.",
    )
    yield (
        *("training", "training", partial(curves.training, run), "Distillation loss against training step"),
        "Training curves, one line per seed, failed and unfinished cells included. Lines that are still falling at the "
        f"right edge mean that the comparison is of short training; stages differ in what their loss is. {KEY}",
    )
    for name, attribute, what in (
        ("cost_time", "seconds", "Time"),
        ("cost_memory", "peak_bytes", "Memory"),
        ("cost_flops", "flops", "Operations"),
    ):
        yield (
            *("cost", name, partial(curves.cost, run, attribute), f"{what} against the number of tokens"),
            f"{what} of one UNet forward pass, batch 1. {GROWTH} At few tokens the rest of the network dominates. "
            "What else ran on the machine is in its times, and not in operations.",
        )


def _pictures(run: Run) -> Iterator[Plan]:
    """Those that show pictures and matrices."""
    for size in run.sample_sizes:
        seen = "the size trained on" if size == run.train_size else "a size never trained on"
        yield (
            *("samples", f"samples_{size}", partial(pictures.sample_grid, run, size)),
            f"Samples at {size} px, rows: variants, columns: prompts",
            f"Samples at {size} px, {seen}: the teacher, then each variant with its first finished seed, from the same "
            f"prompts and starting noise. A good mixer's row repeats the teacher's. {pictures.LICENSE}",
        )
    yield (
        *("matrices", "mixing_matrices", partial(pictures.matrices, run), "Mixing matrix of each variant"),
        f"Mixing matrices: the weights with which one head mixes tokens of one {run.train_size} px image; row: the "
        "token written, column: the token read, in raster order. Each panel has its own scale, white at 0; red is "
        "positive, blue negative. A causal mixer leaves the upper triangle empty. The teacher's is what a student "
        "should recover.",
    )
    yield (
        *("matrices", "receptive_fields", partial(pictures.fields, run), "Receptive field of each variant"),
        "Receptive fields: the share of weight by offset from the token that is written (center), mean over tokens; "
        "darker is more, each panel on its own scale.",
    )
