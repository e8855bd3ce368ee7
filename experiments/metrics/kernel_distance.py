"""Kernel distance between generated and true images."""

from __future__ import annotations

from torch import Tensor

from experiments.metrics.base import register_metric
from experiments.metrics.inputs.set_distances import (
    DistanceMetric,
    PrecomputedFeatures,
    compute_distance,
    distance_quantities,
    distance_table,
)

SUBSET = 1000
SUBSETS = 100
"""Size and number of the subsets, as published (1801.01401)."""


@register_metric("kernel_distance")
class KernelDistance(DistanceMetric):
    """Kernel distance of generated images to true ones: unbiased MMD² under (x·y/d + 1)³ (1801.01401).

    By torchmetrics, of all images up to 1,000, beyond that the mean over 100 subsets of 1,000. May be below zero.
    """

    title = "Kernel distance"
    quantities = distance_quantities("kernel distance")
    figures = distance_table("Kernel distance to true images; lower is better; unbiased by the number of images.")

    def distance(self, a: Tensor, b: Tensor) -> float:
        """See `DistanceMetric.distance`."""
        from torchmetrics.image.kid import KernelInceptionDistance

        subsets = SUBSETS if max(len(a), len(b)) > SUBSET else 1
        size = min(len(a), len(b), SUBSET)
        return compute_distance(
            KernelInceptionDistance(feature=PrecomputedFeatures(a.shape[1]), subsets=subsets, subset_size=size), a, b
        )
