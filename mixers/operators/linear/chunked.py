"""Causal, in blocks of c tokens: W inside a block, the state between blocks. O(l·(c + k)·v), matrix products only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mixers.operators.linear.state import LinearState

CHUNK = 64


def causal(q: Tensor, k: Tensor, v: Tensor, initial: LinearState | None) -> tuple[Tensor, LinearState]:
    """Means over tokens 0 … i, (b, l, h, v), and the state after the last; any l."""
    length, past = q.shape[1], initial.tokens if initial else 0
    chunk = min(CHUNK, length)
    padding = -length % chunk  # zero keys add nothing; the rows are cut off below
    q, k, v = (rearrange(F.pad(t, (0, 0, 0, 0, 0, padding)), "b (n c) h x -> n b h c x", c=chunk) for t in (q, k, v))
    inside = (q @ k.transpose(-1, -2)).tril() @ v
    additions = k.transpose(-1, -2) @ v
    totals = additions.cumsum(0)
    before = totals - additions
    if initial:
        totals, before = totals + initial.memory, before + initial.memory
    sums = rearrange(inside + q @ before, "n b h c v -> b (n c) h v")[:, :length]
    counts = torch.arange(past + 1, past + length + 1, device=q.device, dtype=q.dtype)
    return sums / counts[:, None, None], LinearState(totals[-1], past + length)
