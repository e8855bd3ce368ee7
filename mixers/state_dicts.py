"""Conversion of other libraries' state dicts to those of our mixers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConvertedStateDict:
    """The content of another library's state dict: how to build our mixer, and its parameters under our names.

    Attributes:
        dim: model width d.
        heads: number of heads.
        options: options of `create_mixer`.
        tensors: the state dict of the mixer.
    """

    dim: int
    heads: int
    options: dict[str, Any]
    tensors: dict[str, Tensor]


def require_tensors(state: Mapping[str, Tensor], *names: str) -> None:
    """Raise ValueError if the state dict lacks one of these tensors; the message names the missing ones."""
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(
            f"Not a state dict of such a block: {', '.join(missing)} missing. The tensors are {', '.join(state)}."
        )


def split_rows(state: Mapping[str, Tensor], name: str, rows: list[int]) -> tuple[Tensor, ...]:
    """Split a tensor of a state dict into blocks of rows.

    Raises:
        ValueError: The tensor does not have sum(rows) rows.
    """
    if len(state[name]) != sum(rows):
        raise ValueError(f"Expected {name} with {' + '.join(map(str, rows))} rows, got {len(state[name])}.")
    return state[name].split(rows)


FLA_NAMES = {
    "q_proj.weight": "projections.to_q.weight",
    "k_proj.weight": "projections.to_k.weight",
    "v_proj.weight": "projections.to_v.weight",
    "o_proj.weight": "projections.to_out.weight",
    "g_proj.weight": "output.to_gate.weight",
    "g_norm.weight": "output.norm.weight",
    "g_norm_swish_gate.weight": "output.norm.weight",
    "o_norm.weight": "output.norm.weight",
}
"""Names that the layers of `fla` have in common -> ours."""


def convert_fla_state_dict(
    state: Mapping[str, Tensor], options: Mapping[str, Any], names: Mapping[str, str]
) -> ConvertedStateDict:
    """Convert the state dict of an `fla` layer: projections, short convolutions, gate and norm per head.

    The number of heads follows from the width of the norm; if the norm has no weight, `options` must contain `heads`.

    Args:
        state: the layer's tensors.
        options: options that the shapes do not determine.
        names: further names of this layer -> ours; all of them are required.

    Raises:
        ValueError: A tensor is missing, or the number of heads cannot be inferred.
    """
    require_tensors(state, "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", *names)
    renamed = FLA_NAMES | dict(names)
    convolutions = [name for name in ("v_conv1d", "k_conv1d", "q_conv1d") if f"{name}.weight" in state]
    prefixes = tuple(f"{name}." for name in convolutions)
    tensors = {renamed.get(name, name): t for name, t in state.items() if not name.startswith(prefixes)}
    dim, inner = state["o_proj.weight"].shape
    heads = _infer_heads(tensors, options, inner)
    if "output.norm.weight" not in tensors:
        tensors["output.norm.weight"] = state["o_proj.weight"].new_ones(inner // heads)
    derived: dict[str, Any] = {"expand": inner / dim, "conv_size": 0, "gate": "g_proj.weight" in state}
    if convolutions:
        weights = [state[f"{name}.weight"] for name in convolutions]
        tensors["short_conv.weight"] = torch.cat(weights)
        derived |= {"conv_size": weights[0].shape[-1], "conv_bias": f"{convolutions[0]}.bias" in state}
        if derived["conv_bias"]:
            tensors["short_conv.bias"] = torch.cat([state[f"{name}.bias"] for name in convolutions])
    overrides = {name: value for name, value in options.items() if name != "heads"}
    return ConvertedStateDict(dim, heads, derived | overrides, tensors)


def _infer_heads(tensors: Mapping[str, Tensor], options: Mapping[str, Any], inner: int) -> int:
    if "heads" in options:
        return int(options["heads"])
    norm = tensors.get("output.norm.weight")
    if norm is None:
        raise ValueError(
            "Cannot infer the number of heads, because the norm has no weight: pass heads=…. "
            f"The tensors are {', '.join(tensors)}."
        )
    return inner // len(norm)
