"""Gated DeltaNet (Yang et al. 2024, 2412.06464)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from mixers.config import MixerConfig
from mixers.delta_mixer import DeltaConfig, DeltaMixer
from mixers.entries import register_mixer
from mixers.stages.decays import ScalarDecay
from mixers.state_dicts import ConvertedStateDict, convert_fla_state_dict, require_tensors


@dataclass(frozen=True)
class GatedDeltaNetConfig(DeltaConfig):
    """Options of `gated_deltanet`; published: keys of 0.75 d and values twice as wide.

    Without a gate, widths of 1 and 2 cost the same.

    Attributes:
        decay: forget by one gate per token and head; without it, the mixer is DeltaNet (2406.06484).
    """

    expand: float = 1.5
    expand_k: float = 0.75
    decay: bool = True


@register_mixer("gated_deltanet")
class GatedDeltaNet(DeltaMixer):
    """Gated DeltaNet (2412.06464): S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ, y_t = q_tᵀ S_t / √k.

    q and k have norm 1, β = σ(to_beta(x)), α = exp(−Δ exp(A_log)) with Δ = softplus(to_dt(x) + dt_bias). The result is
    normalized by RMSNorm per head and multiplied by SiLU(to_gate(x)). No layer has a bias.

    Deviations from the published block: without the short convolution, q, k and v do not pass through SiLU, because
    the drop-in form starts from a host's projections; fla applies it.
    """

    Config: ClassVar[type[MixerConfig]] = GatedDeltaNetConfig
    drop_in_options: ClassVar[Mapping[str, Any]] = {
        "expand": 1,
        "expand_k": 1,
        "conv_size": 0,
        "norm": False,
        "gate": False,
    }

    config: GatedDeltaNetConfig

    def __init__(self, config: GatedDeltaNetConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.decay = ScalarDecay(dim, heads, a_range=(0.0, 16.0)) if config.decay else None

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Compute log α of tokens (b, l, d): (b, l, h), or None without decay."""
        return None if self.decay is None else self.decay(x)[1]

    def mixing_flops(self, length: int) -> int:
        """Add the operations of α."""
        decay = 0 if self.decay is None else 2 * length * self.dim * self.heads
        return super().mixing_flops(length) + decay

    @classmethod
    def convert_state_dict(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> ConvertedStateDict:
        """Convert the state dict of `fla`'s GatedDeltaNet with short convolutions.

        Pass allow_neg_eigval if it is set. Not supported: more heads of values than of keys, a gate other than SiLU.
        """
        names = {
            "a_proj.weight": "decay.to_dt.weight",
            "A_log": "decay.A_log",
            "dt_bias": "decay.dt_bias",
            "b_proj.weight": "to_beta.weight",
        }
        require_tensors(state, "q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight")
        converted = convert_fla_state_dict(state, options, names)
        derived = {"expand_k": len(state["q_proj.weight"]) / converted.dim}
        return replace(converted, options=derived | converted.options)
