"""Learned human preference of the generated images, by judges of the package `imscore`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from pydantic import Field, field_validator
from torch import Tensor

from experiments.config import EvaluationConfig
from experiments.core.fingerprints import TensorVersions, weights_version
from experiments.core.statistics import bootstrap_interval
from experiments.distill.context import DistillationContext
from experiments.metrics.base import Metric, MetricOptions, MetricRow, Quantity, ValueTable, register_metric
from experiments.metrics.inputs.generated_images import CaptionedBatch, generate_batches
from experiments.metrics.inputs.judges import JUDGES, open_judge
from experiments.metrics.inputs.student import EvaluatedStudent
from mixers.suggest import unknown_name


class PreferenceRow(MetricRow):
    """Mean scores at one size and guidance by one judge.

    Attributes:
        difference: mean of student − teacher, image by image, for equal captions and noise.
        low, high: its 95 % bootstrap interval over images.
    """

    height: int
    width: int
    guidance: float
    judge: str
    images: int
    student: float
    teacher: float
    difference: float
    low: float
    high: float


class PreferenceOptions(MetricOptions):
    """Which judges."""

    judges: tuple[str, ...] = Field(("pickscore",), min_length=1, description=f"of {', '.join(JUDGES)}; NAME:FOLDER")

    @field_validator("judges")
    @classmethod
    def _check_judges(cls, judges: tuple[str, ...]) -> tuple[str, ...]:
        for judge in judges:
            if judge.partition(":")[0] not in JUDGES:
                raise ValueError(unknown_name("judge", judge.partition(":")[0], JUDGES))
        return judges


@register_metric("preference")
class Preference(Metric):
    """Learned human preference of the student's images and its teacher's, from equal captions and noise.

    Judges are those of `imscore`: PickScore, HPSv2, HPSv3 and ImageReward. They were trained on photographs and art, so
    scores of the embedded teacher's drawings mean little. Costs `generated.images` samples for each size, guidance and
    judge, of the student and, once for all students, of the teacher.
    """

    title = "Learned preference"
    row = PreferenceRow
    options_type = PreferenceOptions
    by_default = False
    quantities = (
        Quantity("student", "the student's mean score", better="higher"),
        Quantity("teacher", "the teacher's mean score", better="neither"),
        Quantity("difference", "the student's score minus the teacher's", better="higher", perfect=0.0),
        Quantity("low", "lower bound of the difference's 95 % interval over images", better="neither"),
        Quantity("high", "upper bound of the difference's 95 % interval over images", better="neither"),
    )
    figures = (
        ValueTable(
            ("student",),
            "Mean score of images for their captions by learned human preference; higher is better.",
            (("teacher", "teacher"),),
        ),
    )

    def measure(self, student: EvaluatedStudent) -> list[MetricRow]:
        """See `Metric.measure`."""
        plan = student.plan
        rows: list[MetricRow] = []
        for judge in self.options.judges if plan.generated.images else ():
            for size in plan.generated.sizes:
                rows += [self._row(student, judge, size, guidance) for guidance in plan.all_guidances]
        return rows

    def _row(self, student: EvaluatedStudent, judge: str, size: int, guidance: float) -> PreferenceRow:
        context = student.context
        version = weights_version(context.teacher.denoiser)
        teacher = _teacher_scores(context, student.plan, student.data, size, guidance, judge, version)
        with student.adapter.mounted():
            batches = generate_batches(context, student.plan, student.data, size, guidance)
            scores = _scores(context, judge, batches)
        difference = bootstrap_interval((scores - teacher).tolist())
        return PreferenceRow(
            height=size,
            width=size,
            guidance=guidance,
            judge=judge,
            images=len(scores),
            student=float(scores.mean()),
            teacher=float(teacher.mean()),
            difference=difference.mean,
            low=difference.low,
            high=difference.high,
        )


@lru_cache(maxsize=16)
def _teacher_scores(
    context: DistillationContext,
    plan: EvaluationConfig,
    data: str,
    size: int,
    guidance: float,
    judge: str,
    version: TensorVersions,
) -> Tensor:
    return _scores(context, judge, generate_batches(context, plan, data, size, guidance))


def _scores(context: DistillationContext, judge: str, batches: Iterable[CaptionedBatch]) -> Tensor:
    """Scores (n,) of images by a judge, which is opened first, so that a missing one is reported before any work."""
    model = open_judge(judge, str(context.teacher.device))
    return torch.cat([model.score(images, captions) for images, captions in batches])
