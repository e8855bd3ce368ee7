"""The first truth: build W (b, h, l, l) and multiply. O(l²) time and memory."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.operators.linear.state import LinearState


def causal(q: Tensor, k: Tensor, v: Tensor, initial: LinearState | None) -> tuple[Tensor, LinearState]:
    """Means over tokens 0 … i, (b, l, h, v), and the state after the last."""
    length, past = q.shape[1], initial.tokens if initial else 0
    weights = torch.einsum("bihk,bjhk->bhij", q, k).tril()
    sums = torch.einsum("bhij,bjhv->bihv", weights, v)
    memory = torch.einsum("blhk,blhv->bhkv", k, v)
    if initial:
        sums = sums + torch.einsum("blhk,bhkv->blhv", q, initial.memory)
        memory = memory + initial.memory
    counts = torch.arange(past + 1, past + length + 1, device=q.device, dtype=q.dtype)
    return sums / counts[:, None, None], LinearState(memory, past + length)


def noncausal(q: Tensor, k: Tensor, v: Tensor, initial: LinearState | None) -> tuple[Tensor, LinearState]:
    """Means over all tokens, (b, l, h, v)."""
    weights = torch.einsum("bihk,bjhk->bhij", q, k) / k.shape[1]
    return torch.einsum("bhij,bjhv->bihv", weights, v), LinearState(k.new_empty(0), k.shape[1])


def bidirectional(q: Tensor, k: Tensor, v: Tensor, initial: LinearState | None) -> tuple[Tensor, LinearState]:
    """A causal and a strictly anti-causal pass, each with its own W; the diagonal is counted once. (b, l, h, v)."""
    weights = torch.einsum("bihk,bjhk->bhij", q, k) / k.shape[1]
    passes = (torch.einsum("bhij,bjhv->bihv", part, v) for part in (weights.tril(), weights.triu(1)))
    return sum(passes, torch.zeros_like(v)), LinearState(k.new_empty(0), k.shape[1])
