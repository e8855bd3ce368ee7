"""selective_scan: W_ij = Σ_n C_i B_j dt_j ∏ exp(dt_t A), a matrix for every value channel, normalized or not.

A backend is a module with three functions on float32 or float64 tensors: `causal` and `bidirectional` give
decayed sums, `noncausal` means over the tokens. Here they become the result, so that scale, eps, normalization and
the skip exist once.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mixers.operators.choice import Problem, choose
from mixers.operators.common import check_causality, check_state, working_dtype
from mixers.operators.scan import chunked, dense, mamba_ssm, recurrent
from mixers.operators.state import State
from mixers.precision import accumulation_dtype, no_autocast
from mixers.traits import Causality

_BACKENDS: dict[str, ModuleType] = {
    "dense": dense,
    "recurrent": recurrent,
    "chunked": chunked,
    "mamba_ssm": mamba_ssm,
}


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    causality: Causality = "causal",
    normalize: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: State | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, State]:
    """The selective state-space model S6 (Mamba, 2312.00752, algorithm 2, with the Euler step for B).

    S_t = exp(dt_t A) S_{t−1} + dt_t u_t B_tᵀ,  y_t = S_t C_t, for every value channel c by itself. As a matrix:
    W_ij[c] = Σ_n C_i[n] B_j[n] dt_j[c] ∏_{t=j+1..i} exp(dt_t[c] A[c, n]) for j ≤ i.

    Args:
        u: (b, l, h, v), the values.
        dt: (b, l, h, v), ≥ 0, the step sizes after the softplus.
        A: (h, v, n), ≤ 0. Neither sign is checked: looking at the values would cost a pass.
        B, C: (b, l, h, n); B ≥ 0 and C ≥ 0 where `normalize`.
        D: (h, v) or None: the skip, y + D·u, added last, neither scaled nor normalized.
        causality: `causal`: token i sees 0 … i. `bidirectional`: a causal and a strictly anti-causal pass, whose
            decay is ∏_{t=i..j−1} exp(dt_t A) for j > i. `noncausal`: all tokens, with no order to decay over: gates
            become weights of their tokens, W_ij[c] = Σ_n C_i[n] B_j[n] dt_j[c] exp(dt_j[c] A[c, n]).
        normalize: divide by the row sums of the weights, of which every value channel has its own.
        eps: where `normalize`, added to the row sum; `noncausal` to the row's mean: repeating tokens changes nothing.
        scale: factor of the unnormalized result.
        initial_state: of the tokens before; causal. Its memory is (b, h, v, n), normalized (b, h, 2·v, n).
        return_state: also return the state after the last token.
        backend: `dense`, `recurrent`, `chunked` (exact; first derivatives only), `mamba_ssm`, or `auto` by a table.

    Returns:
        (b, l, h, v) in u's dtype; sums are float32 at least, under autocast too.
        Cost: O(l·v·n) time and O(l·(v + n)) memory, with gradients too; `normalize` doubles v; `dense` O(v·l²·n).

    Raises:
        ValueError: shapes that do not fit, an unknown causality, or a backend that cannot do what is asked.
    """
    _check(dt, A, B, C, u, D)
    check_causality(causality, initial_state, return_state)
    tensors = {"dt": dt, "A": A, "B": B, "C": C, "u": u}
    problem = Problem("scan", tensors, causality, normalize, return_state, initial_state)
    formulation = choose(_BACKENDS, backend, problem)
    dtype = working_dtype(formulation, u, dt, A, B, C)
    with no_autocast(u):
        streams = tuple(t.to(dtype) for t in (dt, A, B, C, u))
        streams = _with_ones(*streams) if normalize else streams
        y, memory = _sums(formulation, streams, initial_state, causality)
        counts = u.shape[1] if causality == "noncausal" else 1
        y = _divide_by_ones(y, eps) if normalize else y * counts * scale
        y = (y if D is None else y + D.to(dtype) * u.to(dtype)).to(u.dtype)
    seen = initial_state.tokens if initial_state else 0
    return (y, State(memory, seen + u.shape[1])) if return_state else y


def selective_scan_weights(
    dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, causality: Causality, normalize: bool, eps: float, scale: float
) -> Tensor:
    """The matrices (b, h, v, l, l) that `selective_scan` applies to u, from the formula; D is not part of them.

    Args:
        dt: (b, l, h, v), ≥ 0.
        A: (h, v, n), ≤ 0.
        B, C: (b, l, h, n).
        causality, normalize, eps, scale: as of `selective_scan`.

    Returns:
        Float32 at least. Cost: O(v·l²·n) time and O(v·l²) memory, with gradients O(v·l²·n).

    Raises:
        ValueError: shapes that do not fit, or an unknown causality.
    """
    _check(dt, A, B, C)
    check_causality(causality, None, False)
    dtype = accumulation_dtype(dt, A, B, C)
    with no_autocast(dt):
        weights = dense.weights(dt.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype), causality)
    if not normalize:
        return weights * scale
    if causality == "noncausal":
        weights = weights / dt.shape[1]
    return weights / (weights.sum(-1, keepdim=True) + eps)


def _with_ones(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> tuple[Tensor, ...]:
    """The streams of a formulation, with a one for every value, which decays as the value does."""
    return torch.cat([dt, dt], dim=-1), torch.cat([A, A], dim=1), B, C, torch.cat([u, torch.ones_like(u)], dim=-1)


def _divide_by_ones(y: Tensor, eps: float) -> Tensor:
    values, ones = y.chunk(2, dim=-1)
    return values / (ones + eps)


def _sums(
    formulation: ModuleType, streams: tuple[Tensor, ...], initial_state: State | None, causality: Causality
) -> tuple[Tensor, Tensor]:
    """Decayed sums, noncausal means, (b, l, h, v or 2·v), and the memory, which only a causal pass changes."""
    _, A, _, _, u = streams
    check_state(initial_state, (u.shape[0], *A.shape), "(b, h, v or normalized 2·v, n)")
    memory = initial_state.memory.to(u.dtype) if initial_state else u.new_zeros(u.shape[0], *A.shape)
    if causality == "causal":
        return formulation.causal(*streams, memory)
    return (formulation.bidirectional if causality == "bidirectional" else formulation.noncausal)(*streams), memory


def _check(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor | None = None, D: Tensor | None = None) -> None:
    fits = dt.ndim == B.ndim == 4 and A.ndim == 3 and B.shape == C.shape and dt.shape[:3] == B.shape[:3]
    if not fits or A.shape != (*dt.shape[2:], B.shape[3]):
        shapes = f"dt {tuple(dt.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}, C {tuple(C.shape)}"
        raise ValueError(f"Expected dt (b, l, h, v), A (h, v, n), B and C (b, l, h, n), got {shapes}.")
    if u is not None and u.shape != dt.shape:
        raise ValueError(f"Expected u (b, l, h, v) = {tuple(dt.shape)} as dt, got {tuple(u.shape)}.")
    if D is not None and D.shape != dt.shape[2:]:
        raise ValueError(f"Expected D None or (h, v) = {tuple(dt.shape[2:])}, got {tuple(D.shape)}.")
    if dt.shape[1] == 0:
        raise ValueError("Expected at least one token, got l = 0.")
