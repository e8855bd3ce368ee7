"""The functions `delta_rule` and `delta_rule_matrix`: arguments checked, a backend selected."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from mixers.operators.backend import import_backends
from mixers.operators.delta import dense
from mixers.operators.delta.backend import DeltaRuleCall
from mixers.operators.recurrent_state import RecurrentState
from mixers.operators.selection import select_backend
from mixers.operators.validation import check_causality, check_initial_state
from mixers.precision import accumulation_dtype, no_autocast
from mixers.traits import Causality

import_backends(__package__)


@overload
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    causality: Causality = "causal",
    scale: float = 1.0,
    initial_state: RecurrentState | None = None,
    output_final_state: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    causality: Causality = "causal",
    scale: float = 1.0,
    initial_state: RecurrentState | None = None,
    output_final_state: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, RecurrentState]: ...


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    causality: Causality = "causal",
    scale: float = 1.0,
    initial_state: RecurrentState | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, RecurrentState]:
    """The delta rule (DeltaNet, 2406.06484) and, with gates a_t = exp(log_decay_t), its gated form (2412.06464).

    S_t = a_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ,  y_t = scale · q_t S_t. As a matrix, linear in v:
    W_ij = scale · q_iᵀ A_i A_{i−1} … A_{j+1} k_j β_j for j ≤ i, with A_t = a_t (I − β_t k_t k_tᵀ). Erasing makes
    weights negative, so there is nothing to normalize by.

    Args:
        q: (b, l, h, k).
        k: (b, l, h, k), of Euclidean length 1 if β_t k_t k_tᵀ is to be a projection: with β_t |k_t|² > 2 the memory
            grows without bound. This is not checked: inspecting the values would cost a pass.
        v: (b, l, h, v).
        beta: (b, l, h), how strongly a token writes: 0 not at all, 1 replaces what is stored under its key. Up to 2.
        log_decay: ≤ 0: None, (h,) or (b, l, h).
        causality: `causal`: token i sees 0 … i. `bidirectional`: a causal and a strictly anti-causal pass, whose
            weights are W_ij = scale · q_iᵀ A_i A_{i+1} … A_{j−1} k_j β_j for j > i.
        scale: factor of the result.
        initial_state: state before the first token, memory (b, h, k, v); causal only.
        output_final_state: also return the state after the last token.
        backend: `dense`, `recurrent`, `chunked` (matrix products; exact), `fla`, one of your own, or `auto`: the first
            of a table that can compute the call (`mixers.operators.backend_table`).

    Returns:
        (b, l, h, v) in v's dtype, or the pair of it and the final state. State and sums are float32 at least, under
        autocast too. Cost per head, with chunks of c = 32 tokens: O(l·(c + k)·(k + v)) time and
        O(l·(c + k + v + k·(k + v)/c)) memory, with gradients too. `recurrent`: O(l·k·v) time in l steps, with gradients
        as much memory. `dense`: O(l²·(k + v)) time, O(l²) memory, with gradients O(l²·k).

    Raises:
        ValueError: Shapes do not fit, the causality is unknown or `noncausal`, or the backend cannot compute the call.
    """
    _check_shapes(q, k, beta, log_decay, v)
    _check_causality(causality, initial_state, output_final_state)
    check_initial_state(initial_state, (q.shape[0], *q.shape[2:], v.shape[-1]), "(b, h, k, v)")
    call = DeltaRuleCall(
        q=q,
        k=k,
        beta=beta,
        log_decay=_expand_log_decay(q, log_decay),
        v=v,
        decays=log_decay is not None,
        causality=causality,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
    )
    with no_autocast(q):
        y, memory = select_backend(backend, call).run(call)
    if not output_final_state:
        return y
    assert memory is not None
    return y, RecurrentState(memory, call.past + q.shape[1])


def delta_rule_matrix(
    q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None = None, *, causality: Causality, scale: float
) -> Tensor:
    """Return the matrix (b, h, l, l) that `delta_rule` applies to v, from the formula.

    Args and errors are those of `delta_rule`. The result is float32 at least. Cost: O(l²·k) time in l steps and O(l²)
    memory, with gradients O(l²·k).
    """
    _check_shapes(q, k, beta, log_decay)
    _check_causality(causality, None, False)
    gates = _expand_log_decay(q, log_decay)
    dtype = accumulation_dtype(q, k, beta, gates)
    with no_autocast(q):
        q, k, beta, gates = (t.to(dtype) for t in (q, k, beta, gates))
        return dense.mixing_matrix(q, k, beta, gates, causality) * scale


def _expand_log_decay(q: Tensor, log_decay: Tensor | None) -> Tensor:
    """Return log decays (b, l, h); zeros without decay."""
    return (q.new_zeros(1) if log_decay is None else log_decay).expand(q.shape[:3])


def _check_causality(causality: str, initial_state: RecurrentState | None, output_final_state: bool) -> None:
    if causality == "noncausal":
        raise ValueError(
            "The delta rule has no causality='noncausal': a token erases what came before it, and without an order "
            "there is no before. Use causal or bidirectional."
        )
    check_causality(causality, initial_state, output_final_state)


def _check_shapes(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, v: Tensor | None = None) -> None:
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
