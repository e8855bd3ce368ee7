"""The second truth: token by token, S ← S + k vᵀ, y = q S. O(l) steps, each O(k·v)."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.operators.linear.state import LinearState


def causal(q: Tensor, k: Tensor, v: Tensor, initial: LinearState | None) -> tuple[Tensor, LinearState]:
    """Means over tokens 0 … i, (b, l, h, v), and the state after the last."""
    b, length, h, width = q.shape
    memory = initial.memory if initial else q.new_zeros(b, h, width, v.shape[-1])
    tokens = initial.tokens if initial else 0
    means = []
    for i in range(length):
        memory = memory + k[:, i, :, :, None] * v[:, i, :, None, :]
        tokens += 1
        means.append(torch.einsum("bhk,bhkv->bhv", q[:, i], memory) / tokens)
    return torch.stack(means, dim=1), LinearState(memory, tokens)
