"""linear_attention: W = (φ(q) ψ(k)ᵀ) ⊙ L applied to v, normalized by its row sums or not."""

from __future__ import annotations

from torch import Tensor

from mixers.feature_maps import FEATURE_MAPS
from mixers.normalization import count_visible_tokens
from mixers.operators.choice import Problem, choose
from mixers.operators.common import check_causality, check_state
from mixers.operators.linear import blocked, chunked, dense, fla, ordered, recurrent, triton
from mixers.operators.linear.call import Backend, Call
from mixers.operators.state import State
from mixers.precision import no_autocast
from mixers.suggest import hint
from mixers.traits import Causality

_BACKENDS = {
    "dense": Backend(dense),
    "recurrent": Backend(recurrent),
    "chunked": Backend(
        chunked,
        {"causal": ordered.causal, "bidirectional": ordered.bidirectional, "noncausal": blocked.unordered},
    ),
    "triton": Backend(None, {"noncausal": triton.noncausal, "bidirectional": triton.bidirectional}, triton.refuses),
    "fla": Backend(fla, refuses=fla.refuses),
}


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
    initial_state: State | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, State]:
    """Linear attention (2006.16236, eq. 4-12), with gates a_t = exp(log_decay_t) or without.

    W_ij = Σ_c φ(q_i)_c φ(k_j)_c L_ijc with L_ij = ∏_{t=j+1..i} a_t for j ≤ i and, bidirectional,
    ∏_{t=i..j−1} a_t for j > i.
    One gate a token and head is SSD (2405.21060), one a key channel is GLA (2312.06635).

    Args:
        q, k: (b, l, h, k).
        v: (b, l, h, v).
        log_decay: ≤ 0: None, (h,), (b, l, h) or (b, l, h, k).
        feature_map: φ, a name in `mixers.feature_maps`; backends that can apply it as they read q and k.
            With `identity` these are features already, and have to be ≥ 0 where `normalize`.
        causality: `causal`: token i sees 0 … i. `bidirectional`: a causal and a strictly anti-causal pass, which
            without decay is `noncausal`. `noncausal`: all tokens, with no order to decay over: gates become weights
            of their tokens, k_j ← k_j ⊙ a_j.
        normalize: divide by the row sum of the weights.
        eps: where `normalize`, added to the mean visible weight, so that repeating every token changes nothing; with
            decay (causal or bidirectional) there is no such mean: it is added to the decayed sum.
        scale: factor of the unnormalized result.
        initial_state: what earlier tokens left, for a causal pass over the next part of a stream.
        return_state: also return the state after the last token; the result is then a pair.
        backend: `dense`, `recurrent`, `chunked` (matrix products; exact for any decay; first derivatives only),
            `triton`, `fla`, `mamba_ssm`, or `auto`: the first of a table that can (`mixers.operators.preference`).

    Returns:
        (b, l, h, v) in v's dtype; sums are float32 at least, under autocast too.
        Cost: O(l·k·v) time; memory, with gradients too, for the tensors, their gradients and a state now and then;
        `dense` O(l²), with a gate a channel O(l²·k).

    Raises:
        ValueError: shapes that do not fit, an unknown causality or feature map, or a backend that cannot do what is
            asked.
    """
    _check(q, k, v, log_decay, feature_map)
    check_causality(causality, initial_state, return_state)
    check_state(initial_state, (q.shape[0], *q.shape[2:], v.shape[-1] + int(normalize)), "(b, h, k, v [+ 1])")
    gates = _gates(q, log_decay)
    call = Call(q, k, v, gates, feature_map, causality, normalize, eps, scale, initial_state)
    tensors = {"q": q, "k": k, "v": v, "log_decay": gates}
    problem = Problem("linear", tensors, causality, normalize, return_state, initial_state)
    y, memory = choose(_BACKENDS, backend, problem).attend(call)
    return (y, State(memory, call.seen + q.shape[1])) if return_state else y


def linear_weights(
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
    """The matrix (b, h, l, l) that `linear_attention` applies to v, from the formula. O(l²·k) memory with decay."""
    _check(q, k, None, log_decay, feature_map)
    call = Call(q, k, q, _gates(q, log_decay), feature_map, causality, normalize, eps, scale)
    with no_autocast(q):
        call = call.mapped()
        weights = dense.weights(call.q, call.k, call.log_decay, causality)
    if not normalize:
        return weights * scale
    if call.log_decay is None:
        weights = weights / count_visible_tokens(call.q, causality, 0)[:, None]
    return weights / (weights.sum(-1, keepdim=True) + eps)


def flops(length: int, k: int, v: int, causality: Causality, decay: str, sharing: int = 1) -> int:
    """Multiply-adds × 2 of the chunked formulation, a head; elementwise work is not counted.

    decay: `none`, `scalar` (one a token and head) or `vector` (one a channel). sharing: how many heads have one q and
    one k between them, whose products are made once; with one gate a channel each head makes its own.
    """
    whole, chunk = 4 * length * k * v, chunked.chunk_size(k, v)
    if causality == "noncausal" or (causality == "bidirectional" and decay == "none"):
        return whole
    # Weights from halves of a chunk: products of c/2, c/4, … 1 tokens, c/2 + c/4 + … + 1 = c − 1 a token.
    weights = length * k * (chunk - 1) if decay == "vector" else 2 * length * k * chunk // sharing
    return (whole + weights + 2 * length * chunk * v) * (2 if causality == "bidirectional" else 1)


def _gates(q: Tensor, log_decay: Tensor | None) -> Tensor | None:
    """Log decays (b, l, h, 1 or k)."""
    if log_decay is None:
        return None
    gates = log_decay.expand(q.shape[:3]) if log_decay.ndim == 1 else log_decay
    return gates[..., None] if gates.ndim == 3 else gates


def _check(q: Tensor, k: Tensor, v: Tensor | None, log_decay: Tensor | None, feature_map: str) -> None:
    if q.ndim != 4 or q.shape != k.shape or (v is not None and v.shape[:-1] != k.shape[:-1]):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}" + ("" if v is None else f", v {tuple(v.shape)}")
        raise ValueError(f"Expected q and k (b, l, h, k) and v (b, l, h, v), got {shapes}.")
    if q.shape[1] == 0:
        raise ValueError("Expected at least one token, got l = 0.")
    if log_decay is not None and log_decay.shape not in (q.shape[2:3], q.shape[:3], q.shape):
        raise ValueError(
            f"Expected log_decay None, (h,) = {tuple(q.shape[2:3])}, (b, l, h) = {tuple(q.shape[:3])} or "
            f"(b, l, h, k) = {tuple(q.shape)}, got {tuple(log_decay.shape)}."
        )
    if feature_map not in FEATURE_MAPS:
        raise ValueError(
            f"Unknown feature map {feature_map!r}: expected one of {', '.join(FEATURE_MAPS)}."
            f"{hint(feature_map, FEATURE_MAPS)}"
        )
