"""The functions `delta_rule` and `delta_rule_matrix`: arguments checked, a backend selected."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from mixers.operators.backend import import_backends
from mixers.operators.delta import dense
from mixers.operators.delta.backend import DeltaRuleCall
from mixers.operators.recurrent_state import RecurrentState
from mixers.operators.selection import select_backend
from mixers.operators.validation import check_causality, check_eps, check_initial_state
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
    normalize: bool = False,
    eps: float = 1e-6,
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
    normalize: bool = False,
    eps: float = 1e-6,
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
    normalize: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: RecurrentState | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, RecurrentState]:
    """The delta rule (DeltaNet, 2406.06484) and, with gates a_t = exp(log_decay_t), its gated forms.

    S_t = (I − β_t k_t k_tᵀ) Diag(a_t) S_{t−1} + β_t k_t v_tᵀ,  y_t = scale · q_t S_t. One gate per token and head is
    Gated DeltaNet (2412.06464), one per key channel is KDA (2510.26692). As a matrix, linear in v:
    W_ij = scale · q_iᵀ A_i A_{i−1} … A_{j+1} k_j β_j for j ≤ i, with A_t = (I − β_t k_t k_tᵀ) Diag(a_t).

    Normalized, y_t = q_t S_t / (q_t z_t + eps), where z is the state of the same rule with a target of 1 instead of
    v_t, as in SANA-WM (2605.15178): q_t z_t is the row sum of W. Erasing makes weights negative. Row sums of positive
    queries and keys are positive except in sequences that were constructed for the opposite (see docs/mixers.md); this
    is not checked.

    Without an order there is no earlier token to erase. `noncausal` takes one step of the rule on all tokens at once,
    from the state that all tokens write without erasing, with means over tokens and gates as weights of their tokens:

        S_0 = mean_j β_j (a_j ⊙ k_j) v_jᵀ,    S_1 = S_0 + mean_j β_j (a_j ⊙ k_j) (v_j − S_0ᵀ k_j)ᵀ,

    so that W_ij = scale · q_iᵀ (2 I − C) (a_j ⊙ k_j) β_j / l with C = mean_j β_j (a_j ⊙ k_j) k_jᵀ. Its row sums are
    never negative for q, k ≥ 0 and |k| ≤ 1.

    Args:
        q: (b, l, h, k).
        k: (b, l, h, k), of Euclidean length 1 if β_t k_t k_tᵀ is to be a projection: with β_t |k_t|² > 2 the memory
            grows without bound. This is not checked: inspecting the values would cost a pass.
        v: (b, l, h, v).
        beta: (b, l, h), how strongly a token writes: 0 not at all, 1 replaces what is stored under its key. Up to 2.
        log_decay: ≤ 0: None, (h,), (b, l, h) or (b, l, h, k).
        causality: `causal`: token i sees 0 … i. `bidirectional`: a causal and a strictly anti-causal pass, whose
            weights are W_ij = scale · q_iᵀ A_i A_{i+1} … A_{j−1} k_j β_j for j > i. `noncausal`: all tokens at once.
        normalize: divide by the row sums of W; q and k have to be ≥ 0.
        eps: added to the row sums if `normalize`.
        scale: factor of the unnormalized result.
        initial_state: state before the first token, memory (b, h, k, v), or (b, h, k, v + 1) if `normalize`; causal
            only.
        output_final_state: also return the state after the last token.
        backend: `dense`, `recurrent`, `chunked` (matrix products; exact), `fla`, one of your own, or `auto`: the first
            of a table that can compute the call (`mixers.operators.backend_table`).

    Returns:
        (b, l, h, v) in v's dtype, or the pair of it and the final state. State and sums are float32 at least, under
        autocast too. Cost per head, with chunks of c = 32 tokens: O(l·(c + k)·(k + v)) time and
        O(l·(c + k + v + k·(k + v)/c)) memory, with gradients too. `recurrent`: O(l·k·v) time in l steps, with gradients
        as much memory. `dense`: O(l²·(k + v)) time, O(l²) memory, with gradients O(l²·k). `noncausal`: O(l·k·(k + v))
        time and O(l·k) memory.

    Raises:
        ValueError: Shapes do not fit, the causality is unknown, `eps` is 0, or the backend cannot compute the call.
    """
    _check_shapes(q, k, beta, log_decay, v)
    check_causality(causality, initial_state, output_final_state)
    check_eps(eps, normalize, accumulation_dtype(q, k, v))
    memory_shape = (q.shape[0], *q.shape[2:], v.shape[-1] + int(normalize))
    check_initial_state(initial_state, memory_shape, "(b, h, k, v [+ 1])")
    call = DeltaRuleCall(
        q=q,
        k=k,
        beta=beta,
        log_decay=_expand_log_decay(q, log_decay),
        v=v,
        decays=log_decay is not None,
        causality=causality,
        normalize=normalize,
        eps=eps,
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
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    causality: Causality,
    normalize: bool = False,
    eps: float = 1e-6,
    scale: float,
) -> Tensor:
    """Return the matrix (b, h, l, l) that `delta_rule` applies to v, from the formula.

    Args and errors are those of `delta_rule`. The result is float32 at least. Cost: O(l²·k) time in l steps and O(l²)
    memory, with gradients O(l²·k).
    """
    _check_shapes(q, k, beta, log_decay)
    check_causality(causality, None, False)
    gates = _expand_log_decay(q, log_decay)
    dtype = accumulation_dtype(q, k, beta, gates)
    with no_autocast(q):
        q, k, beta, gates = (t.to(dtype) for t in (q, k, beta, gates))
        matrix = dense.mixing_matrix(q, k, beta, gates, causality)
        return matrix / (matrix.sum(-1, keepdim=True) + eps) if normalize else matrix * scale


def _expand_log_decay(q: Tensor, log_decay: Tensor | None) -> Tensor:
    """Return log decays (b, l, h, 1 or k); zeros without decay."""
    if log_decay is not None and log_decay.ndim == 4:
        return log_decay
    return (q.new_zeros(1) if log_decay is None else log_decay).expand(q.shape[:3])[..., None]


def _check_shapes(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, v: Tensor | None = None) -> None:
    if q.ndim != 4 or q.shape != k.shape:
        raise ValueError(f"Expected q and k (b, l, h, k), got q {tuple(q.shape)}, k {tuple(k.shape)}.")
    tokens = tuple(q.shape[:3])
    if v is not None and (v.ndim != 4 or v.shape[:3] != tokens):
        raise ValueError(f"Expected v (b, l, h, v) with (b, l, h) = {tokens} as q, got {tuple(v.shape)}.")
    if beta.shape != tokens:
        raise ValueError(f"Expected beta (b, l, h) = {tokens} as q, got {tuple(beta.shape)}.")
    if log_decay is not None and log_decay.shape not in (tokens[2:], tokens, q.shape):
        raise ValueError(
            f"Expected log_decay None, (h,) = {tokens[2:]}, (b, l, h) = {tokens} or (b, l, h, k) = {tuple(q.shape)}, "
            f"got {tuple(log_decay.shape)}."
        )
    if q.shape[1] == 0:
        raise ValueError("Expected at least one token, got l = 0.")
