"""Similarity of the student's images to the teacher's from equal noise."""

from __future__ import annotations

import torch

from experiments.core.statistics import bootstrap_interval
from experiments.metrics.base import Metric, MetricRow, Quantity, ValueTable, register_metric
from experiments.metrics.inputs.student import EvaluatedStudent


class TeacherSimilarityRow(MetricRow):
    """Mean similarity of the student's images to the teacher's at one size, guidance and network.

    Attributes:
        similarity: mean cosine of the features of two images from equal noise and caption; 1 is the teacher.
        low, high: its 95 % bootstrap interval over images.
        unrelated: mean cosine of the teacher's images of different captions, which is what chance reaches.
    """

    height: int
    width: int
    guidance: float
    features: str
    images: int
    similarity: float
    low: float
    high: float
    unrelated: float


@register_metric("teacher_similarity")
class TeacherSimilarity(Metric):
    """Similarity of the student's images to the teacher's from equal noise: mean cosine of their features.

    With `embedded` or `clip:WHERE` it is CLIP-image similarity, with `dino:WHERE` DINO similarity.
    """

    title = "Similarity to the teacher's images"
    row = TeacherSimilarityRow
    quantities = (
        Quantity("similarity", "mean cosine to the teacher's image", better="higher", perfect=1.0),
        Quantity("low", "lower bound of its 95 % interval over images", better="neither"),
        Quantity("high", "upper bound of its 95 % interval over images", better="neither"),
        Quantity("unrelated", "mean cosine of unrelated images", better="neither"),
    )
    figures = (
        ValueTable(
            ("similarity",),
            "Mean cosine of the features of student's and teacher's images from equal noise and caption; higher is "
            "better, and 1 is the teacher.",
            (("unrelated images of the teacher", "unrelated"),),
        ),
    )

    def measure(self, student: EvaluatedStudent) -> list[MetricRow]:
        """See `Metric.measure`."""
        rows: list[MetricRow] = []
        for sets in student.feature_sets:
            teacher = sets.teacher.features
            cosines = torch.cosine_similarity(sets.student.features, teacher)
            interval = bootstrap_interval(cosines.tolist())
            rows.append(
                TeacherSimilarityRow(
                    height=sets.size,
                    width=sets.size,
                    guidance=sets.guidance,
                    features=sets.network,
                    images=len(cosines),
                    similarity=interval.mean,
                    low=interval.low,
                    high=interval.high,
                    unrelated=float(torch.cosine_similarity(teacher, teacher.roll(1, 0)).mean()),
                )
            )
        return rows
