"""Feature maps φ and ψ, applied elementwise to queries and keys before their dot product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixers.suggest import unknown_name


@dataclass(frozen=True)
class FeatureMap:
    """An elementwise map (b, l, h, k) -> (b, l, h, k). Its functions are module-level, so that mixers pickle.

    Attributes:
        apply: φ.
        slope: the derivative φ′ as a function of φ(x).
        positive: whether φ(x) ≥ 0 everywhere.
        homogeneous: whether φ(t·x) = t·φ(x) for t > 0, so that a temperature cancels if rows are normalized.
    """

    apply: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    positive: bool
    homogeneous: bool = False


def _elu_plus_one(x: Tensor) -> Tensor:
    # The literal elu(x) + 1 cancels to exactly 0 below −6 in bfloat16; here one term is exact and the other 0 or 1.
    y = x.clamp(max=0).exp_()
    return y + x.relu() if torch.is_grad_enabled() else y.add_(x.relu())


def _elu_plus_one_slope(y: Tensor) -> Tensor:
    return y.clamp(max=1)


def _identity(x: Tensor) -> Tensor:
    return x


FEATURE_MAPS: dict[str, FeatureMap] = {
    "elu_plus_one": FeatureMap(_elu_plus_one, slope=_elu_plus_one_slope, positive=True),
    "relu": FeatureMap(torch.relu, slope=torch.sign, positive=True, homogeneous=True),
    "identity": FeatureMap(_identity, slope=torch.ones_like, positive=False, homogeneous=True),
}


def feature_map(name: str, normalize: bool) -> FeatureMap:
    """Look up a feature map for a mixer that is normalized or not.

    Args:
        name: a key of FEATURE_MAPS.
        normalize: whether rows are divided by their sums, which needs a positive map.

    Raises:
        ValueError: The name is unknown, or the map is signed and `normalize` is set.
    """
    if name not in FEATURE_MAPS:
        raise ValueError(unknown_name("feature map", name, FEATURE_MAPS))
    if normalize and not FEATURE_MAPS[name].positive:
        positive = ", ".join(name for name, candidate in FEATURE_MAPS.items() if candidate.positive)
        raise ValueError(
            f"normalize=True needs a positive feature map, got the signed map {name!r}. "
            f"Use one of {positive}, or normalize=False."
        )
    return FEATURE_MAPS[name]
