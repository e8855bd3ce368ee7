"""Precision and recall of generated images by k-nearest-neighbor manifolds."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from experiments.metrics.base import Metric, MetricOptions, MetricRow, Quantity, ValueTable, register_metric
from experiments.metrics.inputs.student import EvaluatedStudent


class PrecisionRecallRow(MetricRow):
    """Precision and recall at one size, guidance and network."""

    height: int
    width: int
    guidance: float
    features: str
    images: int
    precision: float
    recall: float
    teacher_precision: float
    teacher_recall: float


class PrecisionRecallOptions(MetricOptions):
    """The size of a neighborhood."""

    neighbors: int = Field(3, gt=0, description="an image's neighborhood reaches to its k-th nearest neighbor")


@register_metric("precision_recall")
class PrecisionRecall(Metric):
    """Share of generated images inside the true images' manifold, and the reverse (1904.06991).

    A manifold is the union of balls around all images of a set, each of which reaches to its k-th nearest neighbor.
    Precision falls with bad images, recall with missing variety. O(n²) memory. torchmetrics has no such metric.
    """

    title = "Precision and recall"
    row = PrecisionRecallRow
    options_type = PrecisionRecallOptions
    quantities = (
        Quantity("precision", "precision against true images", better="higher"),
        Quantity("recall", "recall of true images", better="higher"),
        Quantity("teacher_precision", "the teacher's precision", better="neither"),
        Quantity("teacher_recall", "the teacher's recall", better="neither"),
    )
    figures = (ValueTable(("precision", "recall"), "Shares of images between 0 and 1; higher is better."),)

    def measure(self, student: EvaluatedStudent) -> list[MetricRow]:
        """See `Metric.measure`."""
        rows: list[MetricRow] = []
        for sets in student.feature_sets:
            neighbors = self.options.neighbors
            true = sets.true.features
            rows.append(
                PrecisionRecallRow(
                    height=sets.size,
                    width=sets.size,
                    guidance=sets.guidance,
                    features=sets.network,
                    images=len(true),
                    precision=coverage(true, sets.student.features, neighbors),
                    recall=coverage(sets.student.features, true, neighbors),
                    teacher_precision=coverage(true, sets.teacher.features, neighbors),
                    teacher_recall=coverage(sets.teacher.features, true, neighbors),
                )
            )
        return rows


def coverage(manifold: Tensor, points: Tensor, neighbors: int) -> float:
    """Return the share of `points` (m, d) inside the manifold that `manifold` (n, d) spans."""
    neighbors = min(neighbors, len(manifold) - 1)
    radii = torch.cdist(manifold, manifold).kthvalue(neighbors + 1).values  # the nearest is the point itself
    inside = torch.cdist(points, manifold) <= radii
    return float(inside.any(1).double().mean())
