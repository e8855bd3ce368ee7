"""The functions `linear_attention` and `linear_attention_matrix`: arguments checked, a backend selected."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from mixers.feature_maps import FEATURE_MAPS
from mixers.normalization import count_visible_tokens
from mixers.operators.backend import import_backends
from mixers.operators.linear import dense
from mixers.operators.linear.backend import LinearAttentionCall
from mixers.operators.recurrent_state import RecurrentState
from mixers.operators.selection import select_backend
from mixers.operators.validation import check_causality, check_eps, check_initial_state
from mixers.precision import accumulation_dtype, no_autocast
from mixers.suggest import unknown_name
from mixers.traits import Causality

import_backends(__package__)


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    feature_map: str = "identity",
    causality: Causality = "noncausal",
    normalize: bool = True,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: RecurrentState | None = None,
    output_final_state: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    feature_map: str = "identity",
    causality: Causality = "noncausal",
    normalize: bool = True,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: RecurrentState | None = None,
    output_final_state: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, RecurrentState]: ...


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    feature_map: str = "identity",
    causality: Causality = "noncausal",
    normalize: bool = True,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: RecurrentState | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, RecurrentState]:
    """Linear attention (2006.16236, eq. 4-12), with gates a_t = exp(log_decay_t) or without.

    W_ij = Σ_c φ(q_i)_c φ(k_j)_c L_ijc with L_ij = ∏_{t=j+1..i} a_t for j ≤ i and, bidirectional,
    ∏_{t=i..j−1} a_t for j > i.
    One gate per token and head is SSD (2405.21060), one per key channel is GLA (2312.06635).

    Args:
        q: (b, l, h, k), or (b, l, 1, k) if all heads share one query, whose products are then computed once.
        k: likewise.
        v: (b, l, h, v).
        log_decay: ≤ 0: None, (h,), (b, l, h) or (b, l, h, k).
        feature_map: φ, a name in `mixers.feature_maps`. With `identity`, q and k are features already; they have to
            be ≥ 0 if `normalize`.
        causality: `causal`: token i sees 0 … i. `bidirectional`: a causal and a strictly anti-causal pass, which
            without decay equals `noncausal`. `noncausal`: all tokens, with no order to decay over, so that gates
            become weights of their tokens, k_j ← k_j ⊙ a_j.
        normalize: divide by the row sums of W.
        eps: added to the mean visible weight if `normalize`, so that repeating every token changes nothing; causal and
            bidirectional calls with decay have no such mean: it is added to the decayed sum.
        scale: factor of the unnormalized result.
        initial_state: state before the first token, for a causal pass over the next part of a sequence.
        output_final_state: also return the state after the last token.
        backend: `dense`, `recurrent`, `chunked`, `triton`, `fla`, one of your own, or `auto`: the first of a table
            that can compute the call (`mixers.operators.backend_table`).

    Returns:
        (b, l, h, v) in v's dtype, or the pair of it and the final state. Sums are float32 at least, under autocast too.
        Cost: O(l·k·v) time; memory, with gradients too, for the tensors, their gradients and one state per block;
        `dense` O(l²), with a gate per channel O(l²·k).

    Raises:
        ValueError: Shapes do not fit, the causality or feature map is unknown, `eps` is 0, or the backend cannot
            compute the call.
    """
    heads = _check_shapes(q, k, v, log_decay)
    _check_feature_map(feature_map)
    check_causality(causality, initial_state, output_final_state)
    check_eps(eps, normalize, accumulation_dtype(q, k, v))
    memory_shape = (v.shape[0], heads, k.shape[-1], v.shape[-1] + int(normalize))
    check_initial_state(initial_state, memory_shape, "(b, h, k, v [+ 1])")
    call = LinearAttentionCall(
        q=q,
        k=k,
        v=v,
        log_decay=_expand_log_decay(log_decay, (*q.shape[:2], heads)),
        feature_map=feature_map,
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


def linear_attention_matrix(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor | None = None,
    *,
    feature_map: str = "identity",
    causality: Causality,
    normalize: bool,
    eps: float,
    scale: float,
) -> Tensor:
    """Return the matrix (b, h, l, l) that `linear_attention` applies to v, from the formula.

    Args and errors are those of `linear_attention`; memory is O(l²), with a gate per channel O(l²·k). No code is
    shared with the backends but that of `dense`.
    """
    heads = _check_shapes(q, k, None, log_decay)
    _check_feature_map(feature_map)
    check_causality(causality, None, False)
    dtype = accumulation_dtype(q, k)
    gates = _expand_log_decay(log_decay, (*q.shape[:2], heads))
    gates = None if gates is None else gates.to(dtype)
    apply = FEATURE_MAPS[feature_map].apply
    with no_autocast(q):
        q = apply(q.to(dtype)).expand(-1, -1, heads, -1)
        k = apply(k.to(dtype)).expand(-1, -1, heads, -1)
        if gates is not None and causality == "noncausal":
            k, gates = k * gates.exp(), None
        matrix = dense.mixing_matrix(q, k, gates, causality)
        if not normalize:
            return matrix * scale
        if gates is None:
            matrix = matrix / count_visible_tokens(q, causality)[:, None]
        return matrix / (matrix.sum(-1, keepdim=True) + eps)


def _expand_log_decay(log_decay: Tensor | None, tokens: tuple[int, ...]) -> Tensor | None:
    """Return log decays of shape (b, l, h, 1 or k)."""
    if log_decay is None:
        return None
    log_decay = log_decay.expand(tokens) if log_decay.ndim == 1 else log_decay
    return log_decay[..., None] if log_decay.ndim == 3 else log_decay


def _check_shapes(q: Tensor, k: Tensor, v: Tensor | None, log_decay: Tensor | None) -> int:
    """Return the number of heads.

    Raises:
        ValueError: Shapes do not fit.
    """
    streams = {"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v}
    if any(t.ndim != 4 for t in streams.values()) or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"Expected q and k (b, l, h, k) and v (b, l, h, v), got {_format_shapes(streams)}.")
    heads = max(q.shape[2], k.shape[2]) if v is None else v.shape[2]
    fits = all(t.shape[:2] == q.shape[:2] for t in streams.values())
    if not fits or not {q.shape[2], k.shape[2]} <= {1, heads}:
        raise ValueError(
            f"Expected q and k (b, l, h, k) and v (b, l, h, v) with the same b and l, and as many heads h in q and k "
            f"as in v, or one that all share; got {_format_shapes(streams)}."
        )
    if q.shape[1] == 0:
        raise ValueError("Expected at least one token, got l = 0.")
    tokens = (*q.shape[:2], heads)
    if log_decay is not None and log_decay.shape not in ((heads,), tokens, (*tokens, q.shape[-1])):
        raise ValueError(
            f"Expected log_decay None, (h,) = {(heads,)}, (b, l, h) = {tokens} or "
            f"(b, l, h, k) = {(*tokens, q.shape[-1])}, got {tuple(log_decay.shape)}."
        )
    return heads


def _format_shapes(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())


def _check_feature_map(feature_map: str) -> None:
    if feature_map not in FEATURE_MAPS:
        raise ValueError(unknown_name("feature map", feature_map, FEATURE_MAPS))
