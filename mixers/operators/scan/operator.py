"""The functions `selective_scan` and `selective_scan_matrix`: arguments checked, a backend selected."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from mixers.operators.backend import import_backends
from mixers.operators.recurrent_state import RecurrentState
from mixers.operators.scan import dense
from mixers.operators.scan.backend import SelectiveScanCall
from mixers.operators.selection import select_backend
from mixers.operators.validation import check_causality, check_eps
from mixers.precision import accumulation_dtype, no_autocast
from mixers.traits import Causality

import_backends(__package__)


@overload
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
    initial_state: RecurrentState | None = None,
    output_final_state: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
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
    initial_state: RecurrentState | None = None,
    output_final_state: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, RecurrentState]: ...


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
    initial_state: RecurrentState | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, RecurrentState]:
    """The selective state-space model S6 (Mamba, 2312.00752, algorithm 2, with the Euler step for B).

    S_t = exp(dt_t A) S_{t−1} + dt_t u_t B_tᵀ,  y_t = S_t C_t, for every value channel c by itself. As a matrix:
    W_ij[c] = Σ_n C_i[n] B_j[n] dt_j[c] ∏_{t=j+1..i} exp(dt_t[c] A[c, n]) for j ≤ i.

    Args:
        u: (b, l, h, v), the values.
        dt: (b, l, h, v), ≥ 0, the step sizes after the softplus.
        A: (h, v, n), ≤ 0. Neither sign is checked: inspecting the values would cost a pass.
        B: (b, l, h, n); ≥ 0 if `normalize`.
        C: (b, l, h, n); ≥ 0 if `normalize`.
        D: (h, v) or None: the skip, y + D·u, added last, neither scaled nor normalized.
        causality: `causal`: token i sees 0 … i. `bidirectional`: a causal and a strictly anti-causal pass, whose
            decay is ∏_{t=i..j−1} exp(dt_t A) for j > i. `noncausal`: all tokens, with no order to decay over: gates
            become weights of their tokens, W_ij[c] = Σ_n C_i[n] B_j[n] dt_j[c] exp(dt_j[c] A[c, n]).
        normalize: divide by the row sums of W, of which every value channel has its own.
        eps: added to the row sum if `normalize`; `noncausal` to the row's mean, so that repeating every token changes
            nothing.
        scale: factor of the unnormalized result.
        initial_state: state before the first token; causal only. Its memory is (b, h, v, n), normalized (b, h, 2·v, n).
        output_final_state: also return the state after the last token.
        backend: `dense`, `recurrent`, `chunked`, `mamba_ssm`, one of your own, or `auto`: the first of a table that can
            compute the call (`mixers.operators.backend_table`).

    Returns:
        (b, l, h, v) in u's dtype, or the pair of it and the final state. Sums are float32 at least, under autocast too.
        Cost: O(l·v·n) time and O(l·(v + n)) memory, with gradients too; `normalize` doubles v; `dense` O(v·l²·n).

    Raises:
        ValueError: Shapes do not fit, the causality is unknown, `eps` is 0, or the backend cannot compute the call.
    """
    _check_shapes(dt, A, B, C, u, D)
    check_causality(causality, initial_state, output_final_state)
    call = SelectiveScanCall(
        u=u,
        dt=dt,
        A=A,
        B=B,
        C=C,
        causality=causality,
        normalize=normalize,
        eps=eps,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
    )
    check_eps(eps, normalize, call.dtype)
    with no_autocast(u):
        y, memory = select_backend(backend, call).run(call)
        y = (y if D is None else y + D.to(call.dtype) * u.to(call.dtype)).to(u.dtype)
    if not output_final_state:
        return y
    assert memory is not None
    return y, RecurrentState(memory, call.past + u.shape[1])


def selective_scan_matrix(
    dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, causality: Causality, normalize: bool, eps: float, scale: float
) -> Tensor:
    """Return the matrices (b, h, v, l, l) that `selective_scan` applies to u, from the formula, without D.

    Args and errors are those of `selective_scan`. The result is float32 at least. Cost: O(v·l²·n) time and O(v·l²)
    memory, with gradients O(v·l²·n).
    """
    _check_shapes(dt, A, B, C)
    check_causality(causality, None, False)
    dtype = accumulation_dtype(dt, A, B, C)
    with no_autocast(dt):
        matrix = dense.mixing_matrix(dt.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype), causality)
    if not normalize:
        return matrix * scale
    if causality == "noncausal":
        matrix = matrix / dt.shape[1]
    return matrix / (matrix.sum(-1, keepdim=True) + eps)


def _check_shapes(
    dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor | None = None, D: Tensor | None = None
) -> None:
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
