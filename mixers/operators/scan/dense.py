"""The first truth: build W (b, h, v, l, l) and multiply. O(v·l²·n) time, O(v·l²) memory, with gradients O(v·l²·n)."""

from __future__ import annotations

import torch
from torch import Tensor


def weights(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, causality: str) -> Tensor:
    """W_ij[v] = dt_j[v] Σ_n C_i[n] B_j[n] exp(A[v, n] span_ij[v]), (b, h, v, l, l), by its definition."""
    span = spans(dt, causality)
    total = torch.zeros_like(span)
    for rate, key, query in zip(A.unbind(-1), B.unbind(-1), C.unbind(-1), strict=True):
        pairs = torch.einsum("bih,bjh->bhij", query, key)
        total = total + pairs[:, :, None] * (rate[..., None, None] * span).exp()
    weighted = total * dt.permute(0, 2, 3, 1)[..., None, :]
    return weighted.tril() if causality == "causal" else weighted


def spans(dt: Tensor, causality: str) -> Tensor:
    """(b, l, h, v) -> (b, h, v, l, l): the time over which what token j added decays until token i reads it.

    Σ_{t=j+1..i} dt_t for j ≤ i; for j > i Σ_{t=i..j−1} dt_t where bidirectional, else 0; dt_j where noncausal.
    Each is summed by itself: a difference of running sums would lose small terms next to large ones.
    """
    length = dt.shape[1]
    steps = dt.permute(0, 2, 3, 1)
    if causality == "noncausal":
        return steps[..., None, :].expand(*steps.shape, length)
    rows = steps[..., None].expand(*steps.shape, length)
    forward = rows.tril(-1).cumsum(-2)
    if causality == "causal":
        return forward
    return forward + rows.triu(1).flip(-2).cumsum(-2).flip(-2)


def causal(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Decayed sums over tokens 0 … i and over the memory, (b, l, h, v), and the memory after the last (b, h, v, n)."""
    y = torch.einsum("bhvij,bjhv->bihv", weights(dt, A, B, C, "causal"), u)
    since_start = (A * dt.cumsum(1)[..., None]).exp()  # (b, l, h, v, n)
    to_end = (A[..., None] * spans(dt, "causal")[..., None, -1, :]).exp()  # (b, h, v, n, l)
    added = torch.einsum("bhvnl,blhv,blhn->bhvn", to_end, dt * u, B)
    return y + torch.einsum("blhn,blhvn,bhvn->blhv", C, since_start, memory), since_start[:, -1] * memory + added


def bidirectional(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
    """Sums over all tokens, decayed in both directions, (b, l, h, v)."""
    return torch.einsum("bhvij,bjhv->bihv", weights(dt, A, B, C, "bidirectional"), u)


def noncausal(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
    """Means over all tokens, (b, l, h, v)."""
    return torch.einsum("bhvij,bjhv->bihv", weights(dt, A, B, C, "noncausal") / u.shape[1], u)
