"""The second truth: token by token, S ← a S + k vᵀ, y = q S. O(l) steps, each O(k·v)."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.operators.common import both_directions


def causal(
    q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor, memory: Tensor, diagonal: bool = True
) -> tuple[Tensor, Tensor]:
    """Decayed sums over tokens 0 … i and over the memory, (b, l, h, v), and the memory after the last.

    Without the diagonal a token reads the memory after it decayed it, and before it adds to it.
    """
    sums = []
    for i in range(q.shape[1]):
        kept = memory if log_decay is None else memory * log_decay[:, i, :, :, None].exp()
        memory = kept + k[:, i, :, :, None] * v[:, i, :, None, :]
        sums.append(torch.einsum("bhk,bhkv->bhv", q[:, i], memory if diagonal else kept))
    return torch.stack(sums, dim=1), memory


def bidirectional(q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor) -> Tensor:
    """Sums over all tokens, decayed in both directions, (b, l, h, v)."""
    memory = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
    if log_decay is None:
        return both_directions(lambda q, k, v, diagonal: causal(q, k, None, v, memory, diagonal)[0], q, k, v)
    return both_directions(lambda q, k, g, v, diagonal: causal(q, k, g, v, memory, diagonal)[0], q, k, log_decay, v)


def noncausal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Means over all tokens, (b, l, h, v): the memory after the last token, read by every token."""
    memory = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
    for i in range(q.shape[1]):
        memory = memory + k[:, i, :, :, None] * v[:, i, :, None, :]
    return torch.stack([torch.einsum("bhk,bhkv->bhv", row, memory) for row in q.unbind(1)], dim=1) / q.shape[1]
