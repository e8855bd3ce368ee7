"""linear_attention: W = (q kᵀ) ⊙ L applied to v, normalised by its row sums or not.

A formulation is a module with three functions on float32 or float64 tensors: `causal` and `bidirectional` give
(decayed) sums, `noncausal` means over the tokens. Here they become the result, so that scale, eps and normalisation
exist once.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mixers.operators.common import (
    check_causality,
    check_state,
    choose,
    divide_by_ones,
    full_precision,
    precision,
    with_ones,
)
from mixers.operators.linear import chunked, dense, recurrent
from mixers.operators.state import State
from mixers.traits import Causality

_FORMULATIONS: dict[str, ModuleType] = {"dense": dense, "recurrent": recurrent, "chunked": chunked}


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    causality: Causality = "noncausal",
    normalize: bool = True,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: State | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, State]:
    """Linear attention (2006.16236, eq. 4-12), with gates a_t = exp(log_decay_t) or without, on mapped features.

    W_ij = Σ_c q_ic k_jc L_ijc with L_ij = ∏_{t=j+1..i} a_t for j ≤ i and, bidirectional, ∏_{t=i..j−1} a_t for j > i.
    One gate a token and head is SSD (2405.21060), one a key channel is GLA (2312.06635).

    Args:
        q, k: (b, l, h, k), after the feature map; k ≥ 0 and q ≥ 0 where `normalize`.
        v: (b, l, h, v).
        log_decay: ≤ 0: None, (h,), (b, l, h) or (b, l, h, k).
        causality: `causal`: token i sees 0 … i. `bidirectional`: a causal and a strictly anti-causal pass, which
            without decay is `noncausal`. `noncausal`: all tokens, with no order to decay over: gates become weights
            of their tokens, k_j ← k_j ⊙ a_j.
        normalize: divide by the row sum of the weights.
        eps: where `normalize`, added to the mean visible weight, so that repeating every token changes nothing; with
            decay (causal or bidirectional) there is no such mean: it is added to the decayed sum.
        scale: factor of the unnormalised result.
        initial_state: what earlier tokens left, for a causal pass over the next part of a stream.
        return_state: also return the state after the last token; the result is then a pair.
        backend: `dense`, `recurrent`, `chunked` (matrix products; exact for any decay), or `auto`, which is `chunked`.

    Returns:
        (b, l, h, v) in v's dtype; sums are float32 at least, under autocast too.
        Cost: O(l·k·v) time and O(l·(k + v)) memory; with decay O(l·k·log c) memory for chunks of c = 64 tokens;
        `dense` O(l²), with a gate a channel O(l²·k).

    Raises:
        ValueError: shapes that do not fit, an unknown causality, or a backend that cannot do what is asked.
    """
    _check(q, k, v, log_decay)
    check_causality(causality, initial_state, return_state)
    check_state(initial_state, (q.shape[0], *q.shape[2:], v.shape[-1] + int(normalize)), "(b, h, k, v [+ 1])")
    dtype = precision(q, k, v)
    values = with_ones(v.to(dtype)) if normalize else v.to(dtype)
    with full_precision(q):
        q, k, gates = _gated(q.to(dtype), k.to(dtype), log_decay, causality)
        memory = initial_state.memory if initial_state else q.new_zeros(q.shape[0], *q.shape[2:], values.shape[-1])
        seen = initial_state.tokens if initial_state else 0
        mixed, memory = _mix(choose(_FORMULATIONS, backend), q, k, gates, values, memory, causality)
        counts = visible(q, causality, seen)[:, None, None]
        if causality != "noncausal" and normalize and gates is None:
            mixed = mixed / counts
        elif causality == "noncausal" and not normalize:
            mixed = mixed * counts
        y = (divide_by_ones(mixed, eps) if normalize else mixed * scale).to(v.dtype)
    return (y, State(memory, seen + q.shape[1])) if return_state else y


def _mix(
    formulation: ModuleType, q: Tensor, k: Tensor, gates: Tensor | None, v: Tensor, memory: Tensor, causality: str
) -> tuple[Tensor, Tensor]:
    """Sums over the visible tokens (means where non-causal: there may be millions), and the memory after the last."""
    if causality == "causal":
        return formulation.causal(q, k, gates, v, memory)
    if causality == "bidirectional":
        return formulation.bidirectional(q, k, gates, v), memory
    return formulation.noncausal(q, k, v), memory


def linear_weights(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor | None = None,
    *,
    causality: Causality,
    normalize: bool,
    eps: float,
    scale: float,
) -> Tensor:
    """The matrix (b, h, l, l) that `linear_attention` applies to v, from the formula. O(l²·k) memory with decay."""
    dtype = precision(q, k)
    with full_precision(q):
        q, k, gates = _gated(q.to(dtype), k.to(dtype), log_decay, causality)
        weights = dense.weights(q, k, gates, causality)
    if not normalize:
        return weights * scale
    if gates is None:
        weights = weights / visible(q, causality, 0)[:, None]
    return weights / (weights.sum(-1, keepdim=True) + eps)


def flops(length: int, k: int, v: int, causality: Causality, decayed: bool) -> int:
    """Multiply-adds × 2 of the chunked formulation, a head; elementwise work is not counted."""
    whole = 4 * length * k * v
    if causality == "noncausal" or (causality == "bidirectional" and not decayed):
        return whole
    if not decayed:
        return whole + 2 * length * chunked.CHUNK * (k + v)
    # Halving a block of c: products of c/2, c/4, … 1 tokens, c/2 + c/4 + … + 1 = c − 1 a token and pair of halves.
    triangles = length * (chunked.CHUNK - 1) * (k + v)
    return (whole + triangles) * (2 if causality == "bidirectional" else 1)


def visible(q: Tensor, causality: Causality, past: int) -> Tensor:
    """n_i, how many tokens each token sees: (l,)."""
    length = q.shape[1]
    if causality != "causal":
        return torch.full((length,), float(length), device=q.device, dtype=q.dtype)
    return torch.arange(past + 1, past + length + 1, device=q.device, dtype=q.dtype)


def _gated(q: Tensor, k: Tensor, log_decay: Tensor | None, causality: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries, keys, and log decays (b, l, h, 1 or k); without an order the gates go into the keys."""
    if log_decay is None:
        return q, k, None
    gates = log_decay.to(q.dtype)
    if gates.ndim == 1:
        gates = gates.expand(q.shape[:3])
    gates = gates[..., None] if gates.ndim == 3 else gates
    return (q, k * gates.exp(), None) if causality == "noncausal" else (q, k, gates)


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.shape[:-1] != k.shape[:-1]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"Expected q and k (b, l, h, k) and v (b, l, h, v), got {shapes}.")
    if q.shape[1] == 0:
        raise ValueError("Expected at least one token, got l = 0.")
    if log_decay is not None and log_decay.shape not in (q.shape[2:3], q.shape[:3], q.shape):
        raise ValueError(
            f"Expected log_decay None, (h,) = {tuple(q.shape[2:3])}, (b, l, h) = {tuple(q.shape[:3])} or "
            f"(b, l, h, k) = {tuple(q.shape)}, got {tuple(log_decay.shape)}."
        )
