"""What every operator shares: precision, normalization, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from mixers.operators.state import State
from mixers.precision import accumulation_dtype
from mixers.traits import CAUSALITIES


def check_causality(causality: str, initial_state: State | None, return_state: bool) -> None:
    """Refuse an unknown causality, and a state where there is no stream.

    Raises:
        ValueError: either.
    """
    if causality not in CAUSALITIES:
        raise ValueError(f"Unknown causality {causality!r}: expected one of {', '.join(CAUSALITIES)}.")
    if causality != "causal" and (initial_state is not None or return_state):
        raise ValueError(f"A state is carried by causal passes only, got causality={causality!r}.")


def check_state(initial_state: State | None, expected: tuple[int, ...], axes: str) -> None:
    """Refuse a state of another shape.

    Raises:
        ValueError: its memory is not `expected`, whose axes are named in `axes`.
    """
    if initial_state is not None and initial_state.memory.shape != expected:
        raise ValueError(
            f"Expected initial_state.memory {axes} = {expected}, got {tuple(initial_state.memory.shape)}: "
            "a state fits the batch, the heads and the switches it was made with."
        )


def working_dtype(backend: ModuleType, result: Tensor, *others: Tensor) -> torch.dtype:
    """What a backend is handed its tensors in: the result's dtype where it sums in float32 itself (NARROW)."""
    return result.dtype if getattr(backend, "NARROW", False) else accumulation_dtype(result, *others)


def one_of_equals(x: Tensor) -> Tensor:
    """(b, l, h, ·) -> (b, l, 1, ·) where `expand` made all heads of one, as Mamba-2 does with B and C; else x."""
    return x[:, :, :1] if x.stride(2) == 0 else x


def segment_sums(g: Tensor) -> Tensor:
    """(…, c, 1) -> (…, c, c): Σ_{t=j+1..i} g_t for j ≤ i, and 0 for j > i; each summed by itself."""
    return g.expand(*g.shape[:-1], g.shape[-2]).tril(-1).cumsum(-2)


def both_directions(causal: Callable[..., Tensor], *streams: Tensor) -> Tensor:
    """A causal pass plus a strictly anti-causal one: the diagonal is counted once. (b, l, h, ·).

    Args:
        causal: called as causal(*streams, diagonal=...); with diagonal=False a token does not see itself.
            In the reversed order each token decays the state with its own gate before it reads, which is the
            reverse pass that is wanted: L_ij = ∏_{t=i..j−1} a_t for j > i.
        streams: (b, l, …) each.
    """
    ahead = causal(*streams, diagonal=True)
    return ahead + causal(*(s.flip(1) for s in streams), diagonal=False).flip(1)
