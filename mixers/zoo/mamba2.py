"""Mamba-2's state space duality, SSD (Dao and Gu 2024, 2405.21060)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mixers.mixer import Streams
from mixers.registry import register_mixer
from mixers.stages.decays import ScalarDecay
from mixers.stages.outputs import RMSNorm
from mixers.state_dicts import ConvertedStateDict, require_tensors, split_rows
from mixers.state_space_mixer import StateSpaceMixer


@register_mixer("mamba2")
class Mamba2(StateSpaceMixer):
    """Mamba-2 (2405.21060): W_ij = C_i·B_j Δ_j ∏ exp(Δ_t A), then RMSNorm((W x + D x)·SiLU(z)).

    One Δ and one A a head. B, C, x, z and Δ = softplus(to_dt(x) + dt_bias) all come from the input; x, B and C go
    through the short convolution. The norm is over the whole inner width, in as many groups as B and C.
    """

    has_decay: ClassVar[bool] = True
    output_options: ClassVar[dict[str, Any]] = {"norm_kind": "rms", "gate_first": True}

    def __init__(self, config: Any, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.decay = ScalarDecay(dim, heads)
        if config.norm:
            self.output.norm = RMSNorm(self.value_width, groups=self.n_groups)

    def add_gates(self, streams: Streams) -> Streams:
        """Add Δ and Δ·A."""
        dt, log_decay = self.decay(streams.x)
        return replace(streams, dt=dt, log_decay=log_decay)

    def mixing_flops(self, length: int) -> int:
        """Those of linear attention, and Δ's."""
        return super().mixing_flops(length) + 2 * length * self.dim * self.heads

    @classmethod
    def convert_state_dict(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> ConvertedStateDict:
        """Of `transformers`' Mamba2Mixer or `mamba_ssm`'s Mamba2; say `groups` where it is not 1 (n_groups, ngroups).

        Not read: limits of Δ other than none, an MLP beside the mixer, and a D for every channel.
        """
        require_tensors(state, "in_proj.weight conv1d.weight dt_bias A_log D out_proj.weight")
        heads, (dim, inner) = len(state["dt_bias"]), state["out_proj.weight"].shape
        both, size = state["conv1d.weight"].shape[0] - inner, state["conv1d.weight"].shape[-1]
        derived = {
            "expand": inner / dim,
            "conv_size": size,
            "norm": "norm.weight" in state,
            "bias": "in_proj.bias" in state,
            "d_state": both // 2 // (options.get("n_groups", cls.Config().n_groups) or heads),
        }
        names = {"conv1d.weight": "short_conv.conv.weight", "A_log": "decay.A_log", "D": "output.D"}
        names |= {"conv1d.bias": "short_conv.conv.bias", "dt_bias": "decay.dt_bias"}
        names |= {"norm.weight": "output.norm.weight", "out_proj.weight": "projections.to_out.weight"}
        names |= {"out_proj.bias": "projections.to_out.bias"}
        found = {names.get(name, name): t for name, t in state.items() if not name.startswith("in_proj.")}
        found.setdefault(names["conv1d.bias"], torch.zeros_like(state["conv1d.weight"][:, 0, 0]))
        parts = ("output.to_gate", "projections.to_v", "projections.to_k", "projections.to_q", "decay.to_dt")
        for kind in {"weight", "bias"} & {name.removeprefix("in_proj.") for name in state}:
            rows = split_rows(state, f"in_proj.{kind}", [inner, inner, both // 2, both // 2, heads])
            found |= {f"{part}.{kind}": r for part, r in zip(parts, rows, strict=True)}
        if "decay.to_dt.bias" in found:
            found["decay.dt_bias"] = found["decay.dt_bias"] + found.pop("decay.to_dt.bias")
        return ConvertedStateDict(dim, heads, {**derived, **options}, found)
