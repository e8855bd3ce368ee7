"""The first truth: build W (b, h, l, l) and multiply. O(l²) time and memory, O(l²·k) with a decay a channel."""

from __future__ import annotations

import torch
from torch import Tensor


def weights(q: Tensor, k: Tensor, log_decay: Tensor | None, causality: str) -> Tensor:
    """W = (q kᵀ) ⊙ L, (b, h, l, l), by its definition; log_decay (b, l, h, 1 or k) or None.

    L_ij = ∏_{t=j+1..i} a_t for j ≤ i, ∏_{t=i..j−1} a_t for j > i where bidirectional, 1 without decay.
    """
    if log_decay is None:
        product = torch.einsum("bihk,bjhk->bhij", q, k)
        return product.tril() if causality == "causal" else product
    mask = segment_sums(log_decay).exp().tril()
    if causality == "bidirectional":
        # The sum over t = i … j−1 of the gates is the sum over t = i+1 … j of the gates moved by one.
        moved = torch.cat([log_decay[:, :1], log_decay[:, :-1]], dim=1)
        mask = mask + segment_sums(moved).exp().tril(-1).transpose(-1, -2)
    if log_decay.shape[-1] == 1:
        return torch.einsum("bihk,bjhk->bhij", q, k) * mask[:, :, 0]
    return torch.einsum("bihk,bjhk,bhkij->bhij", q, k, mask)


def segment_sums(x: Tensor) -> Tensor:
    """(b, l, h, k) -> (b, h, k, l, l): Σ_{t=j+1..i} x_t for j ≤ i, and 0 for j > i.

    Each is summed by itself: a difference of running sums would lose small terms next to large ones.
    """
    length = x.shape[1]
    steps = x.permute(0, 2, 3, 1)[..., None].expand(*x.shape[:1], *x.shape[2:], length, length)
    return steps.tril(-1).cumsum(-2)


def causal(q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Decayed sums over tokens 0 … i and over the memory, (b, l, h, v), and the memory after the last."""
    sums = torch.einsum("bhij,bjhv->bihv", weights(q, k, log_decay, "causal"), v)
    if log_decay is not None:
        since_start = log_decay.cumsum(1).exp()
        to_end = segment_sums(log_decay)[..., -1, :].exp().permute(0, 3, 1, 2)
        q, k = q * since_start, k * to_end
        kept = since_start[:, -1, :, :, None] * memory
    else:
        kept = memory
    return sums + torch.einsum("blhk,bhkv->blhv", q, memory), kept + torch.einsum("blhk,blhv->bhkv", k, v)


def noncausal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Means over all tokens, (b, l, h, v)."""
    return torch.einsum("bhij,bjhv->bihv", weights(q, k, None, "noncausal") / k.shape[1], v)


def bidirectional(q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor) -> Tensor:
    """Sums over all tokens, decayed in both directions, (b, l, h, v)."""
    return torch.einsum("bhij,bjhv->bihv", weights(q, k, log_decay, "bidirectional"), v)
