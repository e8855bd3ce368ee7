"""Normalization by row sums: a value channel of ones goes through the mixing matrix beside the values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixers.traits import Causality


def append_ones(v: Tensor) -> Tensor:
    """Append a channel of ones to the values, (…, v) -> (…, v + 1); mixing turns it into the row sums."""
    return F.pad(v, (0, 1), value=1.0)


def divide_by_last(y: Tensor, eps: float | Tensor) -> Tensor:
    """Divide the mixed values by the mixed channel of ones plus eps: (…, v + 1) -> (…, v)."""
    return y[..., :-1] / (y[..., -1:] + eps)


def count_visible_tokens(like: Tensor, causality: Causality, past: int = 0) -> Tensor:
    """Return how many tokens each token sees, (l,), in the dtype and on the device of `like`.

    Args:
        like: (b, l, …).
        causality: a causal token sees itself and those before it; otherwise each token sees all l.
        past: how many tokens precede the first; causal only.
    """
    length = like.shape[1]
    if causality != "causal":
        return torch.full((length,), float(length), device=like.device, dtype=like.dtype)
    return torch.arange(past + 1, past + length + 1, device=like.device, dtype=like.dtype)
