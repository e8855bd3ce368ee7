"""The second reference: token by token, S ← a S + k vᵀ, y = q S. O(l) steps of O(k·v)."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.operators.backend import register_backend
from mixers.operators.directions import sum_both_directions
from mixers.operators.linear.backend import LinearAttentionBackend, empty_memory


@register_backend("recurrent")
class RecurrentLinearAttention(LinearAttentionBackend):
    """The recurrence, one token at a time."""

    def causal(
        self, q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return decayed sums over tokens 0 … i and over the memory, (b, l, h, v), and the final memory."""
        return recur(q, k, log_decay, v, memory)

    def bidirectional(self, q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor) -> Tensor:
        """Return sums over all tokens, decayed in both directions, (b, l, h, v)."""
        memory = empty_memory(k, v)
        if log_decay is None:
            return sum_both_directions(lambda q, k, v, diagonal: recur(q, k, None, v, memory, diagonal)[0], q, k, v)
        return sum_both_directions(
            lambda q, k, g, v, diagonal: recur(q, k, g, v, memory, diagonal)[0], q, k, log_decay, v
        )

    def noncausal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return means over all tokens, (b, l, h, v): every token reads the memory after the last one."""
        memory = empty_memory(k, v)
        for i in range(q.shape[1]):
            memory = memory + k[:, i, :, :, None] * v[:, i, :, None, :]
        return torch.stack([torch.einsum("bhk,bhkv->bhv", row, memory) for row in q.unbind(1)], dim=1) / q.shape[1]


def recur(
    q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor, memory: Tensor, diagonal: bool = True
) -> tuple[Tensor, Tensor]:
    """Run the recurrence from a memory; returns what the tokens read, (b, l, h, v), and the final memory.

    With diagonal=False a token reads the memory after decaying it and before adding to it.
    """
    sums = []
    for i in range(q.shape[1]):
        decayed = memory if log_decay is None else memory * log_decay[:, i, :, :, None].exp()
        memory = decayed + k[:, i, :, :, None] * v[:, i, :, None, :]
        sums.append(torch.einsum("bhk,bhkv->bhv", q[:, i], memory if diagonal else decayed))
    return torch.stack(sums, dim=1), memory
