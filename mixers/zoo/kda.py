"""Kimi Delta Attention, KDA (Kimi Team 2025, 2510.26692)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from mixers.config import MixerConfig
from mixers.delta_mixer import DeltaConfig, DeltaMixer
from mixers.entries import register_mixer
from mixers.stages.decays import ChannelDecay
from mixers.stages.projections import LowRankLinear
from mixers.state_dicts import ConvertedStateDict, convert_fla_state_dict, require_tensors


@dataclass(frozen=True)
class KDAConfig(DeltaConfig):
    """Options of `kda`.

    Attributes:
        rank: width between the two layers of the decay and of the gate. None: the width of a head, as published.
    """

    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.rank <= 0:
            raise ValueError(f"Expected rank > 0, or None for the width of a head; got {self.rank}.")


@register_mixer("kda")
class KDA(DeltaMixer):
    """KDA (2510.26692): S_t = (I − β_t k_t k_tᵀ) Diag(α_t) S_{t−1} + β_t k_t v_tᵀ, y_t = q_tᵀ S_t / √k.

    Gated DeltaNet with a gate per token and key channel: α = exp(−exp(A_log) · softplus(up(down(x)) + dt_bias)), with
    one A_log per head. q and k have norm 1, β = σ(to_beta(x)). The result is normalized by RMSNorm per head and
    multiplied by σ(to_gate(x)); to_gate has low rank and, alone, a bias.

    Deviations from the published block: as in fla, whose weights load; without the short convolution, q, k and v do
    not pass through SiLU, because the drop-in form starts from a host's projections.
    """

    Config: ClassVar[type[MixerConfig]] = KDAConfig
    per_channel_decay: ClassVar[bool] = True
    output_options: ClassVar[Mapping[str, Any]] = {"gate_activation": "sigmoid"}
    drop_in_options: ClassVar[Mapping[str, Any]] = {"conv_size": 0, "norm": False, "gate": False}

    config: KDAConfig

    def __init__(self, config: KDAConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.rank = self.head_dim if config.rank is None else config.rank
        self.decay = ChannelDecay(dim, self.key_width, heads, self.rank)
        if config.gate:
            self.output.to_gate = LowRankLinear(dim, self.value_width, self.rank)

    def log_decay(self, x: Tensor) -> Tensor:
        """Compute log α of tokens (b, l, d): (b, l, h, k)."""
        return self.decay(x)

    def mixing_flops(self, length: int) -> int:
        """Add the operations of α, and count those of the gate by its rank."""
        decay = self.rank * (self.dim + self.key_width)
        low_rank_gate = self.rank * (self.dim + self.value_width) - self.dim * self.value_width
        return super().mixing_flops(length) + 2 * length * (decay + (low_rank_gate if self.config.gate else 0))

    @classmethod
    def convert_state_dict(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> ConvertedStateDict:
        """Convert the state dict of `fla`'s KimiDeltaAttention with short convolutions.

        Pass allow_neg_eigval if it is set. Not supported: more heads of values than of keys, a lower bound of the gate.
        """
        names = {
            "A_log": "decay.A_log",
            "dt_bias": "decay.dt_bias",
            "b_proj.weight": "to_beta.weight",
            "f_proj.0.weight": "decay.down.weight",
            "f_proj.1.weight": "decay.up.weight",
            "g_proj.0.weight": "output.to_gate.down.weight",
            "g_proj.1.weight": "output.to_gate.up.weight",
            "g_proj.1.bias": "output.to_gate.up.bias",
        }
        require_tensors(state, "q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight")
        converted = convert_fla_state_dict(state, options, names)
        derived = {
            "expand_k": len(state["q_proj.weight"]) / converted.dim,
            "rank": len(state["f_proj.0.weight"]),
        }
        return replace(converted, options=derived | converted.options | {"gate": True})
