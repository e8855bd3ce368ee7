"""The first reference: build W (b, h, v, l, l) and multiply.

O(v·l²·n) time and O(v·l²) memory, with gradients O(v·l²·n).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.operators.backend import register_backend
from mixers.operators.scan.backend import SelectiveScanBackend


@register_backend("dense")
class DenseSelectiveScan(SelectiveScanBackend):
    """One l × l matrix per value channel, applied to the values."""

    def causal(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return decayed sums over tokens 0 … i and the memory, (b, l, h, v), and the final memory (b, h, v, n)."""
        y = torch.einsum("bhvij,bjhv->bihv", mixing_matrix(dt, A, B, C, "causal"), u)
        since_start = (A * dt.cumsum(1)[..., None]).exp()  # (b, l, h, v, n)
        to_end = (A[..., None] * decay_times(dt, "causal")[..., None, -1, :]).exp()  # (b, h, v, n, l)
        added = torch.einsum("bhvnl,blhv,blhn->bhvn", to_end, dt * u, B)
        y = y + torch.einsum("blhn,blhvn,bhvn->blhv", C, since_start, memory)
        return y, since_start[:, -1] * memory + added

    def bidirectional(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
        """Return sums over all tokens, decayed in both directions, (b, l, h, v)."""
        return torch.einsum("bhvij,bjhv->bihv", mixing_matrix(dt, A, B, C, "bidirectional"), u)

    def noncausal(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
        """Return means over all tokens, (b, l, h, v)."""
        return torch.einsum("bhvij,bjhv->bihv", mixing_matrix(dt, A, B, C, "noncausal") / u.shape[1], u)


def mixing_matrix(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, causality: str) -> Tensor:
    """Return W_ij[v] = dt_j[v] Σ_n C_i[n] B_j[n] exp(A[v, n] time_ij[v]), (b, h, v, l, l), by its definition."""
    times = decay_times(dt, causality)
    total = torch.zeros_like(times)
    for rate, key, query in zip(A.unbind(-1), B.unbind(-1), C.unbind(-1), strict=True):
        scores = torch.einsum("bih,bjh->bhij", query, key)
        total = total + scores[:, :, None] * (rate[..., None, None] * times).exp()
    matrix = total * dt.permute(0, 2, 3, 1)[..., None, :]
    return matrix.tril() if causality == "causal" else matrix


def decay_times(dt: Tensor, causality: str) -> Tensor:
    """Return how long the addition of token j decays before token i reads it: (b, l, h, v) -> (b, h, v, l, l).

    Σ_{t=j+1..i} dt_t for j ≤ i; for j > i Σ_{t=i..j−1} dt_t if bidirectional, otherwise 0; dt_j if noncausal.
    Each sum is computed by itself: a difference of running sums would lose small terms next to large ones.
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
