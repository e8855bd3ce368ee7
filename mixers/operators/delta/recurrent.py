"""The second truth: token by token, S ← a (S − β k kᵀ S) + β k vᵀ, y = q S. O(l) steps, each O(k·v)."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.operators.common import both_directions


def causal(
    q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor, memory: Tensor, diagonal: bool = True
) -> tuple[Tensor, Tensor]:
    """What tokens read of tokens 0 … i and of the memory, (b, l, h, v), and the memory after the last, (b, h, k, v).

    Without the diagonal a token reads the memory that it decayed and erased, before it writes.
    """
    reads = []
    for i in range(q.shape[1]):
        decayed = memory * log_decay[:, i, :, None, None].exp()
        under_key = torch.einsum("bhk,bhkv->bhv", k[:, i], decayed)
        writer = (beta[:, i, :, None] * k[:, i])[..., None]
        kept = decayed - writer * under_key[:, :, None]
        memory = kept + writer * v[:, i, :, None, :]
        reads.append(torch.einsum("bhk,bhkv->bhv", q[:, i], memory if diagonal else kept))
    return torch.stack(reads, dim=1), memory


def bidirectional(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor) -> Tensor:
    """What tokens read in both directions, (b, l, h, v)."""
    memory = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
    return both_directions(
        lambda q, k, beta, g, v, diagonal: causal(q, k, beta, g, v, memory, diagonal)[0], *(q, k, beta, log_decay, v)
    )
