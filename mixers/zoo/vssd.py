"""VSSD's non-causal state space duality (Shi et al. 2024, 2407.18559)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from mixers.config import MixerConfig
from mixers.entries import register_mixer
from mixers.stages.decays import ScalarDecay
from mixers.state_space_mixer import StateSpaceConfig, StateSpaceMixer
from mixers.streams import Streams
from mixers.traits import Causality


@dataclass(frozen=True)
class VSSDConfig(StateSpaceConfig):
    """Options of `vssd`."""

    default_conv_2d: ClassVar[bool] = True

    causality: Causality = "noncausal"
    conv_size: int = 3
    d_state: int | None = 64


@register_mixer("vssd")
class VSSD(StateSpaceMixer):
    """VSSD (2407.18559): W_ij = C_i·B_j (Δ_j |A|), without decay: a token weighs Δ|A|, wherever it is.

    x, B and C pass through a 3 × 3 depthwise convolution over the image and SiLU, and LayerNorm(W x + D x)·z follows;
    the gate z has no SiLU. A causal one sees earlier tokens with the same weights, and its convolution is over tokens.
    """

    Config: ClassVar[type[MixerConfig]] = VSSDConfig
    output_options: ClassVar[Mapping[str, Any]] = {"norm_kind": "layer", "gate_activation": "identity"}

    config: VSSDConfig

    def __init__(self, config: VSSDConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.decay = ScalarDecay(dim, heads)

    def add_gates(self, streams: Streams) -> Streams:
        """Add Δ|A| as the step size, by which the keys of a token are scaled."""
        _, log_decay = self.decay(streams.x)
        return replace(streams, dt=-log_decay)

    def mixing_flops(self, length: int) -> int:
        """Add the operations of Δ."""
        return super().mixing_flops(length) + 2 * length * self.dim * self.heads
