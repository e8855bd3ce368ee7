"""The figures, as PNG files; each comes with a caption that says what to see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from experiments.report import pictures, style
from experiments.report.records import Run, Variant
from experiments.report.tables import over_seeds, summarise

RELATIVE = "squared error to teacher / teacher's mean square"
RATIO = "error to truth / teacher's error to truth"
KEY = "Solid: normalised; dashed: unnormalised. Circle: non-causal; triangle: causal; diamond: bidirectional."


@dataclass(frozen=True)
class Figure:
    """A picture of the report."""

    kind: str
    path: Path
    caption: str
    alt: str


def draw_all(run: Run, directory: Path) -> list[Figure]:
    """Draw every figure for which there is data into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.png"):
        old.unlink()
    with rc_context(style.RC):
        drawn = [
            against_size(run, "relative_error_to_teacher", directory / "error_to_teacher.png"),
            against_size(run, "error_ratio", directory / "error_ratio.png"),
            *(sample_figure(run, size, directory / f"samples_{size}.png") for size in run.sample_sizes),
            matrix_figure(run, directory / "mixing_matrices.png"),
            training(run, directory / "training.png"),
            cost(run, directory / "cost.png"),
        ]
    return [f for f in drawn if f]


def against_size(run: Run, metric: str, path: Path) -> Figure | None:
    """A fidelity metric against resolution, one line per variant, a band over seeds."""
    canvas, axes = _canvas(6.8, 5.4)
    shown = 0
    zero = False
    for variant in run.variants:
        found = [(size, over_seeds(run, variant, size, metric)) for size in run.sizes]
        points = [(size, v) for size, v in found if v and math.isfinite(v.mean) and v.mean > 0]
        zero |= not points and any(v and v.mean == 0 for _, v in found)
        if not points or (variant.untouched and metric == "error_ratio"):
            continue
        shown += 1
        look = style.line(run, variant)
        sizes, values = [p[0] for p in points], [p[1] for p in points]
        axes.plot(sizes, [v.mean for v in values], label=variant.label, **look)
        if any(v.seeds > 1 for v in values):
            low = [max(v.low, v.mean * 1e-3) for v in values]
            axes.fill_between(sizes, low, [v.high for v in values], color=look["color"], alpha=0.15, linewidth=0)
    if not shown:
        return None
    teacher = metric == "relative_error_to_teacher"
    axes.set(xscale="log", yscale="log", xlabel="image side (px)")
    axes.set_ylabel(RELATIVE if teacher else RATIO)
    _ticks(axes, run.sizes)
    _plain_log(axes)
    axes.axvline(run.train_size, color="#999999", linewidth=1, linestyle=":", zorder=0)
    axes.annotate(
        "trained here", (run.train_size, 1), xycoords=("data", "axes fraction"), xytext=(3, 2),
        textcoords="offset points", fontsize=8, color="#666666",
    )  # fmt: skip
    if not teacher:
        axes.axhline(1, color=style.GREY, linewidth=1)
        axes.annotate(
            "as good as the teacher", (1, 1), xycoords=("axes fraction", "data"), ha="right", xytext=(0, -10),
            textcoords="offset points", fontsize=8, color=style.GREY,
        )  # fmt: skip
    _legend(axes)
    _save(canvas, path)
    what = "Error to the teacher" if teacher else "Error to the truth over the teacher's own"
    see = "A line that stays flat carries over to resolutions never trained on; one that rises does not."
    note = " The untouched softmax is exactly 0 and cannot be drawn on a log axis." if teacher and zero else ""
    caption = f"{what} against resolution. {see} {KEY} Line: mean over seeds; band: smallest to largest.{note}"
    return Figure("error", path, caption, f"{what} against resolution, one line per variant")


def training(run: Run, path: Path) -> Figure | None:
    """Smoothed distillation loss against step, one thin line per seed."""
    canvas, axes = _canvas(6.8, 5.0)
    shown = 0
    for variant in run.variants:
        label: str | None = variant.label
        for cell in (c for c in run.cells if c.variant == variant.name):
            rows = [(r["step"], r.get("loss", math.nan)) for r in cell.metrics]
            rows = [(step, loss) for step, loss in rows if math.isfinite(loss) and loss > 0]
            if len(rows) < 2:
                continue
            look = style.line(run, variant) | {"marker": "", "linewidth": 1.2}
            axes.plot([r[0] for r in rows], _smooth([r[1] for r in rows]), label=label, alpha=0.9, **look)
            label, shown = None, shown + 1
    if not shown:
        return None
    axes.set(yscale="log", xlabel="training step", ylabel="distillation loss (smoothed)")
    _plain_log(axes)
    _legend(axes)
    _save(canvas, path)
    caption = (
        "Training curves, one line per seed, failed and unfinished cells included. Lines that are still falling at the "
        "right edge mean that the comparison is of short training. Solid: normalised; dashed: unnormalised."
    )
    return Figure("training", path, caption, "Distillation loss against training step")


def cost(run: Run, path: Path) -> Figure | None:
    """Time and memory of one forward pass against the number of tokens."""
    canvas = Canvas(figsize=(9.6, 4.6), layout="constrained")
    panels = canvas.subplots(1, 2)
    tokens = sorted({s.tokens for c in run.cells for s in c.speed})
    shown = 0
    for axes, attribute, scale in zip(panels, ("seconds", "peak_bytes"), (1e-3, 2**20), strict=True):
        axes.set(xscale="log", yscale="log", xlabel="tokens of the largest self-attention")
        for variant in run.variants:
            points = _costs(run, variant, attribute)
            if not points:
                continue
            shown += 1
            label = variant.label if (power := exponent(points)) is None else f"{variant.label}: {power:.2f}"
            axes.plot([t for t, _ in points], [v / scale for _, v in points], label=label, **style.line(run, variant))
        if axes.lines:
            _ticks(axes, tokens)
            _plain_log(axes)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), title="variant: growth exponent")
        else:
            axes.set_axis_off()
    if not shown:
        return None
    panels[0].set_ylabel("time of one forward pass (ms)")
    panels[1].set_ylabel("peak memory of one forward pass (MiB)")
    _save(canvas, path)
    caption = (
        "Time and memory of one UNet forward pass, batch 1. The growth exponent is the slope in these axes over the "
        "three largest sizes: 1 is linear in tokens, 2 quadratic. At few tokens the rest of the network dominates."
    )
    return Figure("cost", path, caption, "Time and memory against the number of tokens")


def exponent(points: list[tuple[int, float]]) -> float | None:
    """Slope of log value against log tokens over the three largest sizes; None of fewer than two."""
    tail = [(t, v) for t, v in points if t > 0 and v > 0][-3:]
    if len(tail) < 2:
        return None
    return float(np.polyfit(np.log([t for t, _ in tail]), np.log([v for _, v in tail]), 1)[0])


def sample_figure(run: Run, size: int, path: Path) -> Figure | None:
    """Samples at one size: the teacher first, then the variants."""
    if not pictures.sample_grid(run, size, path):
        return None
    seen = "the size trained on" if size == run.train_size else "a size never trained on"
    caption = (
        f"Samples at {size} px, {seen}: the teacher, then each variant with its first finished seed, from the same "
        f"prompts and starting noise. A good mixer's row repeats the teacher's. {pictures.LICENCE}"
    )
    return Figure("samples", path, caption, f"Samples at {size} px, rows: variants, columns: prompts")


def matrix_figure(run: Run, path: Path) -> Figure | None:
    """The mixing matrices as small multiples."""
    if not pictures.matrices(run, path):
        return None
    caption = (
        f"Mixing matrices: the weights with which one head mixes tokens of one {run.train_size} px image; row: the "
        "token written, column: the token read, in raster order. Each panel has its own scale, white at 0; red is "
        "positive, blue negative. A causal mixer leaves the upper triangle empty. The teacher's is what a student "
        "should recover."
    )
    return Figure("matrices", path, caption, "Mixing matrix of each variant")


def _costs(run: Run, variant: Variant, attribute: str) -> list[tuple[int, float]]:
    found: dict[int, list[float]] = {}
    for cell in run.done(variant.name):
        for row in cell.speed:
            value = getattr(row, attribute)
            if value is not None and value > 0:
                found.setdefault(row.tokens, []).append(float(value))
    means = {t: summarise(v) for t, v in found.items()}
    return [(t, v.mean) for t, v in sorted(means.items()) if v]


def _smooth(values: list[float]) -> list[float]:
    """Running mean over about a twentieth of the curve; the window shrinks at its ends."""
    half = max(1, len(values) // 40)
    return [float(np.mean(values[max(0, k - half) : k + half + 1])) for k in range(len(values))]


def _canvas(width: float, height: float) -> tuple[Canvas, Axes]:
    canvas = Canvas(figsize=(width, height), layout="constrained")
    return canvas, canvas.subplots()


def _ticks(axes: Axes, values: list[int]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))


def _plain_log(axes: Axes) -> None:
    """Label a log axis with plain numbers, at 1, 2 and 5 of each decade."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, handlelength=3)


def _save(canvas: Canvas, path: Path) -> None:
    canvas.savefig(path, dpi=150, metadata={"Software": None})
