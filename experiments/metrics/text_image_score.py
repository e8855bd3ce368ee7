"""Agreement of generated images with their captions."""

from __future__ import annotations

from experiments.core.statistics import bootstrap_interval
from experiments.metrics.base import Metric, MetricRow, Quantity, ValueTable, register_metric
from experiments.metrics.inputs.student import EvaluatedStudent


class CaptionScoreRow(MetricRow):
    """Mean agreement of images and captions at one size, guidance and network.

    Attributes:
        low, high: 95 % bootstrap interval of `student` over images.
        true: what true images reach.
    """

    height: int
    width: int
    guidance: float
    features: str
    images: int
    student: float
    low: float
    high: float
    teacher: float
    true: float


@register_metric("text_image_score")
class TextImageScore(Metric):
    """Agreement of images and captions by a CLIP: 100 · the mean cosine of their embeddings (2104.08718).

    Measured with every feature network that is a CLIP.
    """

    title = "Text-image score"
    row = CaptionScoreRow
    quantities = (
        Quantity("student", "text-image score", better="higher"),
        Quantity("low", "lower bound of its 95 % interval over images", better="neither"),
        Quantity("high", "upper bound of its 95 % interval over images", better="neither"),
        Quantity("teacher", "the teacher's text-image score", better="neither"),
        Quantity("true", "text-image score of true images", better="neither"),
    )
    figures = (
        ValueTable(
            ("student",),
            "100 · the mean cosine of image and caption; higher is better.",
            (("teacher", "teacher"), ("true images", "true")),
        ),
    )

    def measure(self, student: EvaluatedStudent) -> list[MetricRow]:
        """See `Metric.measure`."""
        rows: list[MetricRow] = []
        for sets in student.feature_sets:
            scores = sets.student.caption_scores
            if scores is None or sets.teacher.caption_scores is None or sets.true.caption_scores is None:
                continue
            interval = bootstrap_interval(scores.tolist())
            rows.append(
                CaptionScoreRow(
                    height=sets.size,
                    width=sets.size,
                    guidance=sets.guidance,
                    features=sets.network,
                    images=len(scores),
                    student=interval.mean,
                    low=interval.low,
                    high=interval.high,
                    teacher=float(sets.teacher.caption_scores.mean()),
                    true=float(sets.true.caption_scores.mean()),
                )
            )
        return rows
