"""delta_rule: a memory that erases what it holds under a key before it writes there, with a decay or without.

A backend is a module with two functions on float32 or float64 tensors, `causal` and `bidirectional`. Here scale,
checks and the state are added, so that they exist once.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from mixers.operators.choice import Problem, choose
from mixers.operators.common import check_causality, check_state, working_dtype
from mixers.operators.delta import chunked, dense, fla, recurrent
from mixers.operators.state import State
from mixers.precision import accumulation_dtype, no_autocast
from mixers.traits import Causality

_BACKENDS: dict[str, ModuleType] = {"dense": dense, "recurrent": recurrent, "chunked": chunked, "fla": fla}


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    causality: Causality = "causal",
    scale: float = 1.0,
    initial_state: State | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, State]:
    """The delta rule (DeltaNet, 2406.06484) and, with gates a_t = exp(log_decay_t), its gated form (2412.06464).

    S_t = a_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ,  y_t = scale · q_t S_t. As a matrix, linear in v:
    W_ij = scale · q_iᵀ A_i A_{i−1} … A_{j+1} k_j β_j for j ≤ i, with A_t = a_t (I − β_t k_t k_tᵀ). Erasing makes
    weights negative, so there is nothing to normalize by.

    Args:
        q: (b, l, h, k).
        k: (b, l, h, k), of Euclidean length 1 where β_t k_t k_tᵀ is to be a projection: with β_t |k_t|² > 2 the
            memory grows without bound. It is not checked: looking at the values would cost a pass.
        v: (b, l, h, v).
        beta: (b, l, h), how strongly a token writes: 0 not at all, 1 replaces what is under its key. Up to 2.
        log_decay: ≤ 0: None, (h,) or (b, l, h).
        causality: `causal`: token i sees 0 … i. `bidirectional`: a causal and a strictly anti-causal pass, whose
            weights are W_ij = scale · q_iᵀ A_i A_{i+1} … A_{j−1} k_j β_j for j > i.
        scale: factor of the result.
        initial_state: of the tokens before, memory (b, h, k, v); causal.
        return_state: also return the state after the last token.
        backend: `dense`, `recurrent`, `chunked` (matrix products; exact), `fla`, or `auto` by a table.

    Returns:
        (b, l, h, v) in v's dtype; state and sums are float32 at least, under autocast too.
        Cost, with chunks of c = 32 tokens, a head: O(l·(c + k)·(k + v)) time and O(l·(c + k + v + k·(k + v)/c))
        memory, with gradients too. `recurrent`: O(l·k·v) time in l steps, with gradients as much memory.
        `dense`: O(l²·(k + v)) time, O(l²) memory, with gradients O(l²·k).

    Raises:
        ValueError: shapes that do not fit, an unknown causality or `noncausal`, a state where there is no stream, or
            a backend that cannot do what is asked.
    """
    _check(q, k, beta, log_decay, v)
    _check_order(causality, initial_state, return_state)
    memory_shape = (q.shape[0], *q.shape[2:], v.shape[-1])
    check_state(initial_state, memory_shape, "(b, h, k, v)")
    gates = _gates(q, log_decay)
    tensors = {"q": q, "k": k, "beta": beta, "log_decay": log_decay, "v": v}
    formulation = choose(_BACKENDS, backend, Problem("delta", tensors, causality, False, return_state, initial_state))
    dtype = working_dtype(formulation, v, q, k, beta, gates)
    with no_autocast(q):
        streams = tuple(t.to(dtype) for t in (q, k, beta, gates, v))
        memory = initial_state.memory.to(dtype) if initial_state else streams[0].new_zeros(memory_shape)
        causal = causality == "causal"
        y, memory = formulation.causal(*streams, memory) if causal else (formulation.bidirectional(*streams), memory)
        y = (y * scale).to(v.dtype)
    seen = initial_state.tokens if initial_state else 0
    return (y, State(memory, seen + q.shape[1])) if return_state else y


def delta_rule_weights(
    q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None = None, *, causality: Causality, scale: float
) -> Tensor:
    """The matrix (b, h, l, l) that `delta_rule` applies to v, from the formula.

    Args:
        q, k: (b, l, h, k).
        beta: (b, l, h).
        log_decay: ≤ 0: None, (h,) or (b, l, h).
        causality, scale: as of `delta_rule`.

    Returns:
        Float32 at least. Cost: O(l²·k) time in l steps and O(l²) memory, with gradients O(l²·k).

    Raises:
        ValueError: shapes that do not fit, an unknown causality or `noncausal`.
    """
    _check(q, k, beta, log_decay)
    _check_order(causality, None, False)
    gates = _gates(q, log_decay)
    dtype = accumulation_dtype(q, k, beta, gates)
    with no_autocast(q):
        q, k, beta, gates = (t.to(dtype) for t in (q, k, beta, gates))
        return dense.weights(q, k, beta, gates, causality) * scale


def flops(length: int, k: int, v: int, causality: Causality) -> int:
    """Multiply-adds × 2 of the chunked formulation's products, a head.

    Elementwise work is not counted, nor is solving the triangular systems, (c − 1)·(k + v) more a token, which torch
    does not count either.
    """
    c = chunked.CHUNK
    products = c * (3 * k + v) + k * (k + 2 * v)  # within blocks, and to and from the state
    between = -(-length // c) * k * k * v
    return 2 * (length * products + between) * (2 if causality == "bidirectional" else 1)


def _gates(q: Tensor, log_decay: Tensor | None) -> Tensor:
    """Log decays (b, l, h); zeros where there is no decay."""
    return (q.new_zeros(1) if log_decay is None else log_decay).expand(q.shape[:3])


def _check_order(causality: str, initial_state: State | None, return_state: bool) -> None:
    if causality == "noncausal":
        raise ValueError(
            "The delta rule has no causality='noncausal': a token erases what came before it, and without an order "
            "there is no before. Expected causal or bidirectional."
        )
    check_causality(causality, initial_state, return_state)


def _check(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, v: Tensor | None = None) -> None:
    if q.ndim != 4 or q.shape != k.shape:
        raise ValueError(f"Expected q and k (b, l, h, k), got q {tuple(q.shape)}, k {tuple(k.shape)}.")
    tokens = tuple(q.shape[:3])
    if v is not None and (v.ndim != 4 or v.shape[:3] != tokens):
        raise ValueError(f"Expected v (b, l, h, v) with (b, l, h) = {tokens} as q, got {tuple(v.shape)}.")
    if beta.shape != tokens:
        raise ValueError(f"Expected beta (b, l, h) = {tokens} as q, got {tuple(beta.shape)}.")
    if log_decay is not None and log_decay.shape not in (tokens[2:], tokens):
        raise ValueError(
            f"Expected log_decay None, (h,) = {tokens[2:]} or (b, l, h) = {tokens}, got {tuple(log_decay.shape)}."
        )
    if q.shape[1] == 0:
        raise ValueError("Expected at least one token, got l = 0.")
