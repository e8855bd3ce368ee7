"""Fréchet distance between generated and true images."""

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


@register_metric("frechet_distance")
class FrechetDistance(DistanceMetric):
    """Fréchet distance of generated images to true ones, |μ − μ'|² + tr(Σ + Σ' − 2 (Σ Σ')^½) (1706.08500).

    By torchmetrics. Few images bias it upward: compare equal numbers of images only, and not below the floor.
    """

    title = "Fréchet distance"
    quantities = distance_quantities("Fréchet distance")
    figures = distance_table(
        "Fréchet distance to true images; lower is better. Differences below the floor, which is the distance between "
        "two disjoint sets of true images, mean nothing."
    )

    def distance(self, a: Tensor, b: Tensor) -> float:
        """See `DistanceMetric.distance`."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        return compute_distance(FrechetInceptionDistance(feature=PrecomputedFeatures(a.shape[1])), a, b)
