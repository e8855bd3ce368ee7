"""What distances between sets of images share: their rows, how they are read, and torchmetrics on given features."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from experiments.metrics.base import Metric, MetricRow, Quantity, ValueTable
from experiments.metrics.inputs.generated_images import FeatureSets
from experiments.metrics.inputs.student import EvaluatedStudent


class DistanceRow(MetricRow):
    """Distances to the true images at one size, guidance and network; lower is better, and the floor is not zero.

    Attributes:
        images: in each of the sets.
        student, teacher: distance of generated images to the true ones.
        student_to_teacher: distance of the student's images to the teacher's.
        floor: distance between two disjoint sets of true images, which no student can be expected to beat; if the data
            has too few images for a second set of equal size, between two halves, which most distances overstate.
    """

    height: int
    width: int
    guidance: float
    features: str
    images: int
    student: float
    teacher: float
    student_to_teacher: float
    floor: float


class DistanceMetric(Metric):
    """Base of distances between two sets of features; subclasses define `distance`."""

    row = DistanceRow

    def distance(self, a: Tensor, b: Tensor) -> float:
        """Return the distance between two sets of features (n, d) and (m, d)."""
        raise NotImplementedError

    def measure(self, student: EvaluatedStudent) -> list[MetricRow]:
        """See `Metric.measure`."""
        return [row for sets in student.feature_sets for row in self._rows(sets)]

    def _rows(self, sets: FeatureSets) -> Iterator[DistanceRow]:
        true = sets.true.features
        yield DistanceRow(
            height=sets.size,
            width=sets.size,
            guidance=sets.guidance,
            features=sets.network,
            images=len(true),
            student=self.distance(true, sets.student.features),
            teacher=self.distance(true, sets.teacher.features),
            student_to_teacher=self.distance(sets.teacher.features, sets.student.features),
            floor=self._floor(sets),
        )

    def _floor(self, sets: FeatureSets) -> float:
        true = sets.true.features
        if sets.second_true is not None:
            return self.distance(true, sets.second_true.features)
        half = len(true) // 2
        return self.distance(true[:half], true[half : 2 * half]) if half > 1 else math.nan


def distance_quantities(label: str) -> tuple[Quantity, ...]:
    """Return the quantities of a `DistanceRow` for a metric that readers call `label`."""
    return (
        Quantity("student", f"{label} to true images"),
        Quantity("teacher", f"{label} of the teacher to true images", better="neither"),
        Quantity("student_to_teacher", f"{label} to the teacher's images"),
        Quantity("floor", f"{label} between two sets of true images", better="neither"),
    )


def distance_table(caption: str) -> tuple[ValueTable, ...]:
    """Return the table of a distance, with the teacher and the floor as its baselines."""
    baselines = (("teacher", "teacher"), ("other true images", "floor"))
    return (ValueTable(("student",), caption, baselines),)


class PrecomputedFeatures(nn.Module):
    """A torchmetrics feature network for features that are computed already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def compute_distance(metric: Any, a: Tensor, b: Tensor, seed: int = 0) -> float:
    """Run a torchmetrics distance on two sets of features; `seed` selects the subsets of those that draw some."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        warnings.simplefilter("ignore")  # torchmetrics warns that it holds all features, which is intended
        torch.manual_seed(seed)
        metric.update(a.cpu(), real=True)
        metric.update(b.cpu(), real=False)
        value = metric.compute()
    return float(value[0] if isinstance(value, tuple) else value)
