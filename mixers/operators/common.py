"""What every operator shares: precision, normalization, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixers.operators.state import State
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


def precision(*tensors: Tensor) -> torch.dtype:
    """The dtype of state and sums: the widest of the inputs, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def working_dtype(backend: ModuleType, result: Tensor, *others: Tensor) -> torch.dtype:
    """What a backend is handed its tensors in: the result's dtype where it sums in float32 itself (NARROW)."""
    return result.dtype if getattr(backend, "NARROW", False) else precision(result, *others)


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off for the device of a tensor: it would run the sums over tokens in half precision."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def with_ones(v: Tensor) -> Tensor:
    """(…, v) -> (…, v + 1): a column of ones, which the weights turn into their row sums."""
    return F.pad(v, (0, 1), value=1.0)


def divide_by_ones(y: Tensor, eps: float | Tensor) -> Tensor:
    """(…, v + 1) -> (…, v): values over what became of the column of ones, plus eps."""
    return y[..., :-1] / (y[..., -1:] + eps)


def one_of_equals(x: Tensor) -> Tensor:
    """(b, l, h, ·) -> (b, l, 1, ·) where `expand` made all heads of one, as Mamba-2 does with B and C; else x."""
    return x[:, :, :1] if x.stride(2) == 0 else x


def times(fresh: Tensor, factor: Tensor) -> Tensor:
    """The product; without gradients in the place of `fresh`, as a new large tensor costs more than the product.

    Args:
        fresh: nobody else's, in the shape and dtype of the result.
    """
    return fresh * factor if torch.is_grad_enabled() else fresh.mul_(factor)


def plus_product(fresh: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """fresh + a · b, in its place as `times` is."""
    return torch.addcmul(fresh, a, b) if torch.is_grad_enabled() else fresh.addcmul_(a, b)


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
