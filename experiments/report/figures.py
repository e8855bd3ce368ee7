"""All figures of a report, with captions and alternative texts; those of metrics come from the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib import rc_context
from PIL import Image

from experiments.core.figures import RC
from experiments.data.emoji import LICENSE
from experiments.metrics import HeatMap, LinePlot, Metric
from experiments.report import effect_plots, heat_maps, image_grids, line_plots, style
from experiments.report.effects import Effect
from experiments.report.overview import plot_overview
from experiments.report.run_files import RunRecord
from experiments.report.sections import OVERVIEW, reported_metrics

LEGEND = 'Dashed: not normalized; dash-dotted: scale="mean"; marker: causality.'
BAND = f"{LEGEND} Band: smallest to largest over seeds, if there are several."


@dataclass(frozen=True)
class ReportFigure:
    """A figure that was drawn.

    Attributes:
        section: title of the section it belongs to.
        path: of its PNG.
        caption, alt: texts for readers.
    """

    section: str
    path: Path
    caption: str
    alt: str

    @property
    def width(self) -> int:
        """Width in CSS pixels at 96 per inch."""
        with Image.open(self.path) as image:
            return round(image.width * 96 / style.DPI)


@dataclass(frozen=True)
class _Plan:
    section: str
    name: str
    draw: Callable[[Path], bool]
    alt: str
    caption: str


def draw_figures(run: RunRecord, effects: list[Effect], directory: Path) -> list[ReportFigure]:
    """Draw every figure for which there is data into `directory`, which is emptied of older ones."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in (*directory.glob("*.png"), *directory.glob("*.svg")):
        old.unlink()
    plans = [_overview(run), *_effect_figures(run, effects), *_metric_figures(run), *_image_figures(run)]
    with rc_context(RC):
        return [
            ReportFigure(plan.section, directory / f"{plan.name}.png", plan.caption, plan.alt)
            for plan in plans
            if plan.draw(directory / f"{plan.name}.png")
        ]


def _overview(run: RunRecord) -> _Plan:
    prompt = f", “{run.description.prompts[-1]}”" if run.description.prompts else ""
    return _Plan(
        OVERVIEW,
        "overview",
        partial(plot_overview, run),
        "Error against size, and samples at every size, of a few rows",
        "The reference row, the rows that differ from it in normalization or in causality alone, the row closest to "
        "the teacher at the largest size, and the identity, which mixes nothing. Left: error to the teacher on "
        "held-out images; band: smallest to largest over seeds, if there are several. "
        f"Right: samples of the last prompt{prompt}, from the same noise at each size. {LICENSE}",
    )


def _effect_figures(run: RunRecord, effects: list[Effect]) -> Iterator[_Plan]:
    yield _Plan(
        "Factors",
        "effects",
        partial(effect_plots.plot_effects, run, effects),
        "Ratio of errors by factor and size",
        "Effect of each factor on the error to the teacher. Stroke: geometric mean over pairs of rows that differ in "
        "it alone; bar: 95 % interval over seeds and images; gray: not distinguishable from noise after correction for "
        "the number of comparisons. Markers: the pairs; if they lie on both sides of 1, the effect depends on the "
        "other factors.",
    )
    yield _Plan(
        "Quality against cost",
        "pareto",
        partial(effect_plots.plot_pareto, run),
        "Error against time and against state size",
        "Quality against cost: error at the largest size, and time and state of one forward pass at the largest size "
        "timed. Down and left is better; no row beats those on the gray steps in both.",
    )
    yield _Plan(
        "Training curves",
        "training",
        partial(line_plots.plot_training, run),
        "Distillation loss against training step",
        "Training curves, one line per seed, failed and unfinished cells included. If lines are still falling at the "
        f"right edge, the comparison is of short training. Stages differ in what their loss is. {LEGEND}",
    )


def _metric_figures(run: RunRecord) -> Iterator[_Plan]:
    for metric in reported_metrics():
        for spec in metric.figures:
            if isinstance(spec, LinePlot):
                yield _line_plot(run, metric, spec)
            elif isinstance(spec, HeatMap):
                label = metric.quantity(spec.quantity).label
                yield _Plan(
                    metric.title,
                    f"{metric.name}_{spec.quantity}",
                    partial(heat_maps.plot_heat_map, run, metric, spec),
                    f"{label[0].upper()}{label[1:]} by {spec.column}, rows: variants",
                    spec.caption,
                )


def _line_plot(run: RunRecord, metric: type[Metric], spec: LinePlot) -> _Plan:
    label = metric.quantity(spec.quantity).label
    return _Plan(
        metric.title,
        f"{metric.name}_{spec.quantity}",
        partial(line_plots.plot_metric, run, metric, spec),
        f"{label[0].upper()}{label[1:]} against {spec.x_label}, one line per variant",
        f"{spec.caption} {BAND}".strip(),
    )


def _image_figures(run: RunRecord) -> Iterator[_Plan]:
    for size in sorted(run.description.sample_sizes):
        role = f"a size that the students were {'' if size in run.train_sizes else 'not '}distilled at"
        yield _Plan(
            "Samples",
            f"samples_{size}",
            partial(image_grids.plot_samples, run, size),
            f"Samples at {size} px, rows: variants, columns: prompts",
            f"Samples at {size} px, {role}: the teacher, then each variant's first finished seed, from the same "
            f"prompts and starting noise. A good mixer's row repeats the teacher's. {LICENSE}",
        )
    yield _Plan(
        "Mixing matrices and receptive fields",
        "mixing_matrices",
        partial(image_grids.plot_mixing_matrices, run),
        "Mixing matrix of each variant",
        f"Mixing matrices of one head for one {run.train_size} px image; row: the token that is written, column: the "
        "token that is read, in raster order. Each panel has its own scale, white at 0; red is positive, blue "
        "negative. A causal mixer leaves the upper triangle empty. The teacher's is what a student should recover.",
    )
    yield _Plan(
        "Mixing matrices and receptive fields",
        "receptive_fields",
        partial(image_grids.plot_receptive_fields, run),
        "Receptive field of each variant",
        "Receptive fields: the share of weight by offset from the token that is written (center), as a mean over "
        "tokens; darker is more, each panel on its own scale.",
    )
