"""linear_attention: W = (q kᵀ) ⊙ L applied to v, normalised by its row sums or not.

Each formulation takes float32 or float64 tensors and returns *means* over the visible tokens,
m_i = 1/n_i Σ_j W_ij v_j; n_i is the number of tokens that token i sees. `linear_attention` turns
them into the result, so that scale, eps and normalisation exist once:

    normalised:     y = m[values] / (m[ones] + eps)        the ones are a column appended to v
    unnormalised:   y = m · n · scale
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixers.operators.linear import chunked, dense, recurrent, two_matmuls
from mixers.operators.linear.state import LinearState
from mixers.traits import CAUSALITIES, Causality

Formulation = Callable[[Tensor, Tensor, Tensor, LinearState | None], tuple[Tensor, LinearState]]

# Without decay two passes see every token once, as the non-causal form does; dense builds them, for the proof.
_FORMULATIONS: dict[tuple[str, Causality], Formulation] = {
    ("dense", "causal"): dense.causal,
    ("dense", "bidirectional"): dense.bidirectional,
    ("dense", "noncausal"): dense.noncausal,
    ("recurrent", "causal"): recurrent.causal,
    ("chunked", "causal"): chunked.causal,
    ("chunked", "bidirectional"): two_matmuls.noncausal,
    ("chunked", "noncausal"): two_matmuls.noncausal,
}
_BRIDGES = ("triton", "fla", "mamba_ssm")


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
    initial_state: LinearState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LinearState]:
    """Linear attention (Katharopoulos 2020, 2006.16236, eq. 4-12) on features that were already mapped.

    Args:
        q, k: (b, l, h, k), after the feature map; k ≥ 0 and q ≥ 0 where `normalize`.
        v: (b, l, h, v).
        log_decay: must be None.
        causality: `causal`: token i sees 0 … i. `noncausal`: all. `bidirectional`: a causal and a strictly
            anti-causal pass, which without decay is `noncausal`.
        normalize: divide by the row sum of the weights.
        eps: added to the mean visible weight where `normalize`; repeating every token changes nothing.
        scale: factor of the unnormalised result.
        initial_state: what earlier tokens left, for a causal pass over the next part of a stream.
        return_state: also return the state after the last token; the result is then a pair.
        backend: `dense`, `recurrent` (causal only), `chunked`, or `auto`, which is `chunked`: two matrix products
            where the order does not matter, blocks of matrix products where it does.

    Returns:
        (b, l, h, v) in v's dtype; sums are float32 at least, under autocast too.
        Cost: O(l·k·v) time and O(l·(k + v)) memory; `dense` O(l²).

    Raises:
        ValueError: shapes that do not fit, an unknown causality, or a backend that cannot do what is asked.
        NotImplementedError: `log_decay` is given.
    """
    _check(q, k, v, log_decay, causality)
    _check_state(q, v, causality, normalize, initial_state, return_state)
    formulation = _choose(backend, causality)
    dtype = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
    values = v.to(dtype)
    values = F.pad(values, (0, 1), value=1.0) if normalize else values
    with full_precision(q):
        means, state = formulation(q.to(dtype), k.to(dtype), values, initial_state)
    if normalize:
        y = means[..., :-1] / (means[..., -1:] + eps)
    else:
        y = means * visible(q, causality, initial_state)[:, None, None].to(dtype) * scale
    y = y.to(v.dtype)
    return (y, state) if return_state else y


def linear_weights(q: Tensor, k: Tensor, *, causality: Causality, normalize: bool, eps: float, scale: float) -> Tensor:
    """The matrix (b, h, l, l) that `linear_attention` applies to v, from the formula. O(l²) memory."""
    counts = visible(q, causality, None)[:, None]
    with full_precision(q):
        weights = torch.einsum("bihk,bjhk->bhij", q, k)
    weights = weights.tril() if causality == "causal" else weights
    if not normalize:
        return weights * scale
    means = weights / counts
    return means / (means.sum(-1, keepdim=True) + eps)


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off for the device of a tensor: it would run the sums over tokens in half precision."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def visible(q: Tensor, causality: Causality, initial_state: LinearState | None) -> Tensor:
    """n_i, how many tokens each token sees: (l,)."""
    length, dtype = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    if causality != "causal":
        return torch.full((length,), float(length), device=q.device, dtype=dtype)
    past = initial_state.tokens if initial_state else 0
    return torch.arange(past + 1, past + length + 1, device=q.device, dtype=dtype)


def backends() -> dict[str, str]:
    """Every backend of this operator -> "available", or the reason why it cannot run here."""
    found = dict.fromkeys((name for name, _ in _FORMULATIONS), "available")
    for name in _BRIDGES:
        here = importlib.util.find_spec(name) is not None
        found[name] = "not implemented yet" if here else "not implemented yet, and the package is not installed"
    return found


def _choose(backend: str, causality: Causality) -> Formulation:
    chosen = _FORMULATIONS.get(("chunked" if backend == "auto" else backend, causality))
    if chosen is None:
        reason = (
            "it runs token by token, so it is causal only"
            if backend == "recurrent"
            else backends().get(backend, "no such backend")
        )
        raise ValueError(
            f"backend={backend!r} cannot do causality={causality!r}: {reason}. Expected auto, dense or chunked."
        )
    return chosen


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, causality: str) -> None:
    if log_decay is not None:
        raise NotImplementedError("linear_attention with log_decay is not implemented yet: pass None.")
    if causality not in CAUSALITIES:
        raise ValueError(f"Unknown causality {causality!r}: expected one of {', '.join(CAUSALITIES)}.")
    if q.ndim != 4 or q.shape != k.shape or v.shape[:3] != k.shape[:3]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"Expected q and k (b, l, h, k) and v (b, l, h, v), got {shapes}.")
    if q.shape[1] == 0:
        raise ValueError("Expected at least one token, got l = 0.")


def _check_state(
    q: Tensor, v: Tensor, causality: str, normalize: bool, initial_state: LinearState | None, return_state: bool
) -> None:
    if causality != "causal" and (initial_state is not None or return_state):
        raise ValueError(f"A state is carried by causal passes only, got causality={causality!r}.")
    expected = (q.shape[0], *q.shape[2:], v.shape[-1] + int(normalize))
    if initial_state is not None and initial_state.memory.shape != expected:
        raise ValueError(
            f"Expected initial_state.memory (b, h, k, v{' + 1' if normalize else ''}) = {expected}, got "
            f"{tuple(initial_state.memory.shape)}: a state fits the batch, heads and normalize it was made with."
        )
