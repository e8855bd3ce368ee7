"""VSSD's non-causal state space duality (Shi et al. 2024, 2407.18559)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from mixers.mixer import Streams
from mixers.registry import register_mixer
from mixers.stages.decays import ScalarDecay
from mixers.state_space_mixer import StateSpaceConfig, StateSpaceMixer
from mixers.traits import Causality


@dataclass(frozen=True)
class VSSDConfig(StateSpaceConfig):
    """Options of `vssd`."""

    causality: Causality = "noncausal"
    conv_size: int = 0
    d_state: int | None = 64


@register_mixer("vssd")
class VSSD(StateSpaceMixer):
    """VSSD (2407.18559): W_ij = C_i·B_j (Δ_j |A|), no decay: what a token writes weighs Δ|A|, wherever it stands.

    A causal one sees earlier tokens, with the same weights. After it LayerNorm(W x + D x)·z, as in the published code,
    whose gate z has no SiLU and whose weight is Δ·A < 0 (the sign is one of B's). Of the published block the 3 × 3
    depthwise convolution and SiLU on the image of x, B and C is left out; `conv_size` is the nearest part
    there is. What the whole block adds around the mixer is left out as well.
    """

    Config: ClassVar[Any] = VSSDConfig
    output_options: ClassVar[dict[str, Any]] = {"norm_kind": "layer", "linear_gate": True}

    def __init__(self, config: Any, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.decay = ScalarDecay(dim, heads)

    def add_gates(self, streams: Streams) -> Streams:
        """Add Δ|A|, as the weight of a token."""
        return replace(streams, dt=-self.decay(streams.x)[1])

    def mixing_flops(self, length: int) -> int:
        """Those of linear attention, and Δ's."""
        return super().mixing_flops(length) + 2 * length * self.dim * self.heads
