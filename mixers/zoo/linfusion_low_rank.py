"""LinFusion's generalized low-rank form (Liu et al. 2024, 2409.02097), at any rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from mixers.feature_maps import FEATURE_MAPS
from mixers.mixer import Streams
from mixers.registry import register_mixer
from mixers.stages.projections import linear_in_full_precision
from mixers.zoo.linfusion import LinFusion, LinFusionConfig


@dataclass(frozen=True)
class LinFusionLowRankConfig(LinFusionConfig):
    """Options of `linfusion_low_rank`.

    Attributes:
        rank: r of F Gᵀ; features and state grow r times.
    """

    rank: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"Expected rank ≥ 1, got {self.rank}.")


@register_mixer("linfusion_low_rank")
class LinFusionLowRank(LinFusion):
    """LinFusion at rank r (2409.02097): W = (C Bᵀ) ⊙ (F Gᵀ), rows normalized; C = φ(q), B = φ(k) as in linfusion.

    The paper derives this form and gives no F and G. Here F = elu(to_f(x)) + 1 and G = softmax(to_g(x)) over the r,
    for every head: both positive, so that weights are. to_f starts at zero, so F = 1, F Gᵀ = 1 and a fresh one is
    linfusion, whatever to_g is; that to_g starts random is what tells the r apart. At r = 1 G is 1, and F cancels:
    linfusion again, but for eps.

    Computed as linear attention on row-wise Khatri-Rao features, c_i = vec(C_i ⊗ F_i) and b_j = vec(B_j ⊗ G_j).
    """

    Config: ClassVar[Any] = LinFusionLowRankConfig
    tiny_options: ClassVar[dict[str, Any]] = {"mid_dim": 4, "rank": 3}

    def __init__(self, config: Any, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.to_f, self.to_g = (nn.Linear(dim, heads * config.rank) for _ in range(2))
        nn.init.zeros_(self.to_f.weight)
        nn.init.zeros_(self.to_f.bias)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """F and G of tokens (b, l, d): (b, l, h, r) each, ≥ 0, float32 at least."""
        f, g = (self.split_heads(linear_in_full_precision(layer, x)) for layer in (self.to_f, self.to_g))
        return FEATURE_MAPS["elu_plus_one"].apply(f), g.softmax(-1)

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """vec(C ⊗ F) and vec(B ⊗ G): (b, l, h, k·r) each, float32 at least."""
        (C, B), (f, g) = super().features(streams), self.factors(streams.x)
        return _khatri_rao(C, f), _khatri_rao(B, g)

    @property
    def features_dim(self) -> int:
        """k·r."""
        return super().features_dim * self.config.rank

    def mixing_flops(self, length: int) -> int:
        """Those of linfusion with r times the features, and to_f's and to_g's."""
        return super().mixing_flops(length) + 4 * length * self.dim * self.heads * self.config.rank


def _khatri_rao(x: Tensor, y: Tensor) -> Tensor:
    """(…, k) and (…, r) -> (…, k·r), all products."""
    return (x[..., None] * y[..., None, :]).flatten(-2)
