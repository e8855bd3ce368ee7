"""φ and ψ: what is done to queries and keys before they meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixers.suggest import hint


@dataclass(frozen=True)
class FeatureMap:
    """An elementwise map (b, l, h, k) -> (b, l, h, k).

    Attributes:
        apply: φ.
        slope: φ′, from the values of φ.
        positive: whether values are ≥ 0.
    """

    apply: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    positive: bool


def _elu_plus_one(x: Tensor) -> Tensor:
    # The literal elu(x) + 1 cancels to exactly 0 below −6 in bfloat16; here one term is exact and the other 0 or 1.
    y = x.clamp(max=0).exp_()
    return y + x.relu() if torch.is_grad_enabled() else y.add_(x.relu())


FEATURE_MAPS: dict[str, FeatureMap] = {
    "elu_plus_one": FeatureMap(_elu_plus_one, slope=lambda y: y.clamp(max=1), positive=True),
    "relu": FeatureMap(torch.relu, slope=torch.sign, positive=True),
    "identity": FeatureMap(lambda x: x, slope=torch.ones_like, positive=False),
}


def feature_map(name: str, normalize: bool) -> FeatureMap:
    """Look a feature map up, for a mixer that is normalized or not.

    Raises:
        ValueError: unknown name, or a signed map where weights are to be normalized.
    """
    if name not in FEATURE_MAPS:
        raise ValueError(
            f"Unknown feature map {name!r}: expected one of {', '.join(FEATURE_MAPS)}.{hint(name, FEATURE_MAPS)}"
        )
    if normalize and not FEATURE_MAPS[name].positive:
        positive = ", ".join(n for n, m in FEATURE_MAPS.items() if m.positive)
        raise ValueError(
            f"normalize=True needs weights ≥ 0, and the feature map {name!r} is signed: "
            f"use one of {positive}, or normalize=False."
        )
    return FEATURE_MAPS[name]
