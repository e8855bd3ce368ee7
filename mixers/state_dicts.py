"""State dicts of other libraries: what a loader reads from one, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConvertedStateDict:
    """What a peer's state dict says: how to build our mixer, and its parameters under our names."""

    dim: int
    heads: int
    options: dict[str, Any]
    state: dict[str, Tensor]


def require_tensors(state: Mapping[str, Tensor], names: str) -> None:
    """Refuse a state dict that lacks one of these tensors.

    Raises:
        ValueError: it does; the message names them.
    """
    missing = [name for name in names.split() if name not in state]
    if missing:
        raise ValueError(
            f"Not the state dict of such a block: {', '.join(missing)} missing. It has {', '.join(state)}."
        )


def split_rows(state: Mapping[str, Tensor], name: str, rows: list[int]) -> tuple[Tensor, ...]:
    """The tensor of that name cut into blocks of rows.

    Raises:
        ValueError: it has another number of rows.
    """
    if len(state[name]) != sum(rows):
        raise ValueError(f"Expected {name} with {' + '.join(map(str, rows))} rows, got {len(state[name])}.")
    return state[name].split(rows)


FLA = {
    **{f"{part}_proj.weight": f"projections.to_{part}.weight" for part in "qkv"},
    **{"o_proj.weight": "projections.to_out.weight", "g_proj.weight": "output.to_gate.weight"},
    **dict.fromkeys(("g_norm.weight", "g_norm_swish_gate.weight", "o_norm.weight"), "output.norm.weight"),
}
"""Names that the layers of `fla` have in common -> ours."""


def convert_fla_state_dict(
    state: Mapping[str, Tensor], options: Mapping[str, Any], names: Mapping[str, str]
) -> ConvertedStateDict:
    """Read the state dict of an `fla` layer: projections, short convolutions, gate and norm per head.

    Heads are told by the width of the norm; where it has no weight, `options` must have `heads`.

    Args:
        names: of the tensors that this layer has besides -> ours; it must have them.

    Raises:
        ValueError: a tensor is missing, or nothing tells the heads.
    """
    require_tensors(state, " ".join(["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", *names]))
    known = {**FLA, **names}
    convolved = [n for n in ("v_conv1d", "k_conv1d", "q_conv1d") if f"{n}.weight" in state]
    found = {known.get(n, n): t for n, t in state.items() if not n.startswith(tuple(f"{c}." for c in convolved))}
    dim, inner = state["o_proj.weight"].shape
    norm = found.get("output.norm.weight")
    if norm is None and "heads" not in options:
        raise ValueError(f"The norm has no weight that would tell the heads: say heads=…. It has {', '.join(state)}.")
    heads = int(options["heads"]) if norm is None or "heads" in options else inner // len(norm)
    if norm is None:
        found["output.norm.weight"] = state["o_proj.weight"].new_ones(inner // heads)
    size = state[f"{convolved[0]}.weight"].shape[-1] if convolved else 0
    if convolved:
        weights = [state[f"{n}.weight"] for n in convolved]
        biases = [state.get(f"{n}.bias", w.new_zeros(len(w))) for n, w in zip(convolved, weights, strict=True)]
        found["short_conv.conv.weight"] = torch.cat(weights)
        found["short_conv.conv.bias"] = torch.cat(biases)
    derived = {"expand": inner / dim, "conv_size": size, "gate": "g_proj.weight" in state}
    given = {name: value for name, value in options.items() if name != "heads"}
    return ConvertedStateDict(dim, heads, {**derived, **given}, found)
