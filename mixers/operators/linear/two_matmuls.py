"""Non-causal in two matrix products: M = mean_j k_j v_jᵀ, then y_i = q_i M. O(l·k·v)."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.operators.linear.state import LinearState


def noncausal(q: Tensor, k: Tensor, v: Tensor, initial: LinearState | None) -> tuple[Tensor, LinearState]:
    """Means over all tokens, (b, l, h, v). Keys are divided before the sum, so that millions of them stay finite."""
    length = k.shape[1]
    memory = torch.einsum("blhk,blhv->bhkv", k / length, v)
    return torch.einsum("blhk,bhkv->blhv", q, memory), LinearState(memory, length)
