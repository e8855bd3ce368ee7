"""Mamba-2's state space duality, SSD (Dao and Gu 2024, 2405.21060)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mixers.entries import register_mixer
from mixers.stages.decays import ScalarDecay
from mixers.stages.outputs import RMSNorm
from mixers.state_dicts import ConvertedStateDict, require_tensors, split_rows
from mixers.state_space_mixer import StateSpaceConfig, StateSpaceMixer
from mixers.streams import Streams


@register_mixer("mamba2")
class Mamba2(StateSpaceMixer):
    """Mamba-2 (2405.21060): W_ij = C_i·B_j Δ_j ∏ exp(Δ_t A), then RMSNorm((W x + D x)·SiLU(z)).

    One Δ and one A per head. B, C, x, z and Δ = softplus(to_dt(x) + dt_bias) are all computed from the input; x, B and
    C pass through the short convolution. The norm is over the full inner width, in as many groups as B and C.
    """

    has_decay: ClassVar[bool] = True
    output_options: ClassVar[Mapping[str, Any]] = {"norm_kind": "rms", "gate_first": True}

    def __init__(self, config: StateSpaceConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.decay = ScalarDecay(dim, heads)
        if config.norm:
            self.output.norm = RMSNorm(self.value_width, groups=self.n_groups)

    def add_gates(self, streams: Streams) -> Streams:
        """Add Δ and Δ·A, (b, l, h) each."""
        dt, log_decay = self.decay(streams.x)
        return replace(streams, dt=dt, log_decay=log_decay)

    def mixing_flops(self, length: int) -> int:
        """Add the operations of Δ."""
        return super().mixing_flops(length) + 2 * length * self.dim * self.heads

    @classmethod
    def convert_state_dict(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> ConvertedStateDict:
        """Convert the state dict of `transformers`' Mamba2Mixer or `mamba_ssm`'s Mamba2.

        Pass n_groups (mamba_ssm: ngroups) if it is not 1. Not supported: limits of Δ, an MLP beside the mixer, one D
        per channel.
        """
        require_tensors(state, "in_proj.weight", "conv1d.weight", "dt_bias", "A_log", "D", "out_proj.weight")
        heads = len(state["dt_bias"])
        dim, inner = state["out_proj.weight"].shape
        convolved, _, conv_size = state["conv1d.weight"].shape
        key_width = (convolved - inner) // 2
        derived = {
            "expand": inner / dim,
            "conv_size": conv_size,
            "norm": "norm.weight" in state,
            "bias": "in_proj.bias" in state,
            "d_state": key_width // (options.get("n_groups", 1) or heads),
        }
        names = {
            "conv1d.weight": "short_conv.weight",
            "conv1d.bias": "short_conv.bias",
            "A_log": "decay.A_log",
            "dt_bias": "decay.dt_bias",
            "D": "output.D",
            "norm.weight": "output.norm.weight",
            "out_proj.weight": "projections.to_out.weight",
            "out_proj.bias": "projections.to_out.bias",
        }
        tensors = {names.get(name, name): t for name, t in state.items() if not name.startswith("in_proj.")}
        tensors.setdefault("short_conv.bias", torch.zeros_like(state["conv1d.weight"][:, 0, 0]))
        parts = ("output.to_gate", "projections.to_v", "projections.to_k", "projections.to_q", "decay.to_dt")
        for kind in {"weight", "bias"} & {name.removeprefix("in_proj.") for name in state}:
            rows = split_rows(state, f"in_proj.{kind}", [inner, inner, key_width, key_width, heads])
            tensors |= {f"{part}.{kind}": r for part, r in zip(parts, rows, strict=True)}
        if "decay.to_dt.bias" in tensors:
            tensors["decay.dt_bias"] = tensors["decay.dt_bias"] + tensors.pop("decay.to_dt.bias")
        return ConvertedStateDict(dim, heads, derived | dict(options), tensors)
