"""CMMD: maximum mean discrepancy of CLIP features between generated and true images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from experiments.metrics.base import register_metric
from experiments.metrics.inputs.set_distances import DistanceMetric, distance_quantities, distance_table

SIGMA = 10.0
SCALE = 1000.0
"""Bandwidth and scale, as published (2401.09603)."""


@register_metric("cmmd")
class ClipMeanDiscrepancy(DistanceMetric):
    """CMMD: 1000 · MMD² of unit-norm features under a Gaussian kernel with σ = 10 (2401.09603).

    Assumes no normal distribution and needs few images; published with CLIP features. O(n²) memory.
    """

    title = "CMMD"
    quantities = distance_quantities("CMMD")
    figures = distance_table("CMMD to true images; lower is better.")

    def distance(self, a: Tensor, b: Tensor) -> float:
        """See `DistanceMetric.distance`."""
        a = normalize(a.double(), dim=-1)
        b = normalize(b.double(), dim=-1)

        def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
            return torch.exp(-torch.cdist(x, y).square() / (2 * SIGMA**2)).mean()

        return float(SCALE * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)))
