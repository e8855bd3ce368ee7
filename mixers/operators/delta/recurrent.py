"""The second reference: token by token, S ← (I − β k kᵀ) Diag(a) S + β k vᵀ, y = q S. O(l) steps of O(k·v)."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.operators.backend import register_backend
from mixers.operators.delta.backend import DeltaRuleBackend, empty_memory
from mixers.operators.directions import sum_both_directions


@register_backend("recurrent")
class RecurrentDeltaRule(DeltaRuleBackend):
    """The recurrence, one token at a time."""

    def causal(
        self, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what tokens read of tokens 0 … i and the memory, (b, l, h, v), and the final memory (b, h, k, v)."""
        return recur(q, k, beta, log_decay, v, memory)

    def bidirectional(self, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor) -> Tensor:
        """Return what tokens read in both directions, (b, l, h, v)."""
        memory = empty_memory(k, v)
        return sum_both_directions(
            lambda q, k, beta, g, v, diagonal: recur(q, k, beta, g, v, memory, diagonal)[0], q, k, beta, log_decay, v
        )

    def noncausal(self, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor) -> Tensor:
        """Return what tokens read after one step on all tokens at once, (b, l, h, v), in two passes over the tokens."""
        write_keys = (beta[..., None] * log_decay.exp() * k / k.shape[1])[..., None]
        written = empty_memory(k, v)
        for i in range(k.shape[1]):
            written = written + write_keys[:, i] * v[:, i, :, None, :]
        memory = written
        for i in range(k.shape[1]):
            stored = torch.einsum("bhk,bhkv->bhv", k[:, i], written)
            memory = memory + write_keys[:, i] * (v[:, i] - stored)[:, :, None, :]
        return torch.stack([torch.einsum("bhk,bhkv->bhv", row, memory) for row in q.unbind(1)], dim=1)


def recur(
    q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor, memory: Tensor, diagonal: bool = True
) -> tuple[Tensor, Tensor]:
    """Run the recurrence from a memory; returns what the tokens read, (b, l, h, v), and the final memory.

    With diagonal=False a token reads the memory after decaying and erasing it, and before writing to it.
    """
    reads = []
    for i in range(q.shape[1]):
        decayed = memory * log_decay[:, i, :, :, None].exp()
        stored = torch.einsum("bhk,bhkv->bhv", k[:, i], decayed)
        write_key = (beta[:, i, :, None] * k[:, i])[..., None]
        erased = decayed - write_key * stored[:, :, None]
        memory = erased + write_key * v[:, i, :, None, :]
        reads.append(torch.einsum("bhk,bhkv->bhv", q[:, i], memory if diagonal else erased))
    return torch.stack(reads, dim=1), memory
