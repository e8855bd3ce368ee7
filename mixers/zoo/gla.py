"""Gated linear attention, GLA (Yang et al. 2023, 2312.06635)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from mixers.config import MixerConfig
from mixers.entries import register_mixer
from mixers.linear_mixer import LinearConfig, LinearMixer
from mixers.stages.decays import LowRankDecay
from mixers.stages.projections import Projections
from mixers.state_dicts import ConvertedStateDict, convert_fla_state_dict
from mixers.streams import Streams
from mixers.traits import Causality


@dataclass(frozen=True)
class GLAConfig(LinearConfig):
    """Options of `gla`.

    Attributes:
        expand_k: width of queries and keys over the model width, rounded to whole channels per head. Other than 1, the
            mixer needs its own projections.
        gate_low_rank_dim: rank of the decay's projection.
        gate_logit_normalizer: τ, by which the log gates are divided; a larger one forgets less.
    """

    causality: Causality = "causal"
    normalize: bool = False
    conv_bias: bool = False
    norm: bool = True
    gate: bool = True
    expand_k: float = 0.5
    gate_low_rank_dim: int = 16
    gate_logit_normalizer: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expand_k <= 0 or self.gate_low_rank_dim <= 0:
            raise ValueError(
                f"Expected expand_k > 0 and gate_low_rank_dim > 0, got {self.expand_k} and {self.gate_low_rank_dim}."
            )


@register_mixer("gla")
class GLA(LinearMixer):
    """GLA (2312.06635): W_ij = Σ_c q_ic k_jc ∏_{t=j+1..i} α_tc / √k, with a gate per token and key channel.

    α = σ(up(down(x)) + bias)^(1/τ). The result is normalized by RMSNorm per head and multiplied by SiLU(to_gate(x));
    to_out and to_gate have no bias.

    Deviations from the published block: as in fla, whose weights load. The code of the paper scales by the width of the
    model per head (twice k), normalizes by LayerNorm without weights, has a bias in to_gate, and initializes to_q, to_k
    and the decay by Xavier with gain 2^−2.5.
    """

    Config: ClassVar[type[MixerConfig]] = GLAConfig
    has_decay: ClassVar[bool] = True
    per_channel_decay: ClassVar[bool] = True
    drop_in_options: ClassVar[Mapping[str, Any]] = {"expand_k": 1, "norm": False, "gate": False}
    tiny_options: ClassVar[Mapping[str, Any]] = {"gate_low_rank_dim": 4}

    config: GLAConfig

    def __init__(self, config: GLAConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.decay = LowRankDecay(dim, self.key_width, config.gate_low_rank_dim, config.gate_logit_normalizer)

    @property
    def key_width(self) -> int:
        """expand_k · d, rounded to whole channels per head."""
        return self.heads * max(1, round(self.dim * self.config.expand_k / self.heads))

    def create_projections(self) -> Projections:
        """Create the mixer's own projections, without biases."""
        return Projections(self.dim, self.key_width, self.value_width, bias=False)

    def add_gates(self, streams: Streams) -> Streams:
        """Add log α, (b, l, h, k)."""
        return replace(streams, log_decay=self.split_heads(self.decay(streams.x)))

    @property
    def scale(self) -> float:
        """1 / √k."""
        return self.key_dim**-0.5

    def mixing_flops(self, length: int) -> int:
        """Add the operations of the decay."""
        return super().mixing_flops(length) + 2 * length * self.config.gate_low_rank_dim * (self.dim + self.key_width)

    @classmethod
    def convert_state_dict(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> ConvertedStateDict:
        """Convert the state dict of `fla`'s GatedLinearAttention.

        Pass gate_logit_normalizer if it is not 16, and heads if the norm has no weight. Not supported: keys and values
        shared by heads, a feature map, `clamp_min`, a gate other than SiLU.
        """
        names = {
            "gk_proj.0.weight": "decay.down.weight",
            "gk_proj.1.weight": "decay.up.weight",
            "gk_proj.1.bias": "decay.up.bias",
        }
        converted = convert_fla_state_dict(state, options, names)
        derived = {
            "expand_k": len(state["q_proj.weight"]) / converted.dim,
            "gate_low_rank_dim": len(state["gk_proj.0.weight"]),
        }
        return replace(converted, options=derived | converted.options)
