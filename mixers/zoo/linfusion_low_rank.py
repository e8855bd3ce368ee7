"""LinFusion's generalized low-rank form (Liu et al. 2024, 2409.02097), at any rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from mixers.config import MixerConfig
from mixers.context import RotaryPlacement
from mixers.entries import register_mixer
from mixers.feature_maps import FEATURE_MAPS, FeatureMap
from mixers.stages.projections import FullPrecisionLinear
from mixers.streams import Streams
from mixers.zoo.linfusion import LinFusion, LinFusionConfig


@dataclass(frozen=True)
class LinFusionLowRankConfig(LinFusionConfig):
    """Options of `linfusion_low_rank`.

    Attributes:
        rank: r of F Gᵀ; features and state are r times as large.
    """

    rank: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"Expected rank ≥ 1, got {self.rank}.")


@register_mixer("linfusion_low_rank")
class LinFusionLowRank(LinFusion):
    """LinFusion at rank r (2409.02097): W = (C Bᵀ) ⊙ (F Gᵀ), rows normalized; C = φ(q), B = φ(k) as in linfusion.

    The paper derives this form without specifying F and G. Here F = elu(to_f(x)) + 1 and G = softmax(to_g(x)) over r,
    for every head: both are positive, so W is. to_f starts at zero, so that F = 1, F Gᵀ = 1, and a new mixer equals
    linfusion whatever to_g is; to_g starts at random, because otherwise the r components would stay equal. At r = 1,
    G is 1 and F cancels, which is linfusion again except for eps.

    Computed as linear attention on row-wise Khatri-Rao features, c_i = vec(C_i ⊗ F_i) and b_j = vec(B_j ⊗ G_j).
    """

    Config: ClassVar[type[MixerConfig]] = LinFusionLowRankConfig
    tiny_options: ClassVar[Mapping[str, Any]] = {"mid_dim": 4, "rank": 3}

    config: LinFusionLowRankConfig

    def __init__(self, config: LinFusionLowRankConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.to_f = FullPrecisionLinear(dim, heads * config.rank)
        self.to_g = FullPrecisionLinear(dim, heads * config.rank)
        nn.init.zeros_(self.to_f.weight)
        nn.init.zeros_(self.to_f.bias)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute F and G of tokens (b, l, d): (b, l, h, r) each, ≥ 0, float32 at least."""
        f = self.split_heads(self.to_f(x))
        g = self.split_heads(self.to_g(x))
        return FEATURE_MAPS["elu_plus_one"].apply(f), g.softmax(-1)

    def map_features(self, streams: Streams, feature_map: FeatureMap) -> tuple[Tensor, Tensor]:
        """Compute vec(C ⊗ F) and vec(B ⊗ G): (b, l, h, k·r) each, float32 at least."""
        C, B = super().map_features(streams, feature_map)
        F, G = self.factors(streams.x)
        return _khatri_rao(C, F), _khatri_rao(B, G)

    @property
    def _why_no_text_features(self) -> str:
        """G belongs to the tokens of the layer."""
        return "its features depend on G of the tokens, which the text does not have"

    @property
    def rotary_placements(self) -> dict[RotaryPlacement, str | None]:
        """For every value of `rope`: None if it is supported, otherwise the reason."""
        return {"after_map": "its features are k·r products, not the k channels that rotate", "before_map": None}

    @property
    def features_dim(self) -> int:
        """k·r."""
        return super().features_dim * self.config.rank

    def mixing_flops(self, length: int) -> int:
        """Add the operations of to_f and to_g, once per pass."""
        one_pass = 4 * length * self.dim * self.heads * self.config.rank
        return super().mixing_flops(length) + len(self.value_widths) * one_pass


def _khatri_rao(x: Tensor, y: Tensor) -> Tensor:
    """Return all products of (…, k) and (…, r), (…, k·r)."""
    return (x[..., None] * y[..., None, :]).flatten(-2)
