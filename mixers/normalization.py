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


def count_unmasked_tokens(like: Tensor, causality: Causality, visible: Tensor | None) -> Tensor:
    """Return how many tokens each token sees, of those that no mask hides: (1 or b, 1 or l, 1, 1), 0 if there are none.

    Args:
        like: (b, l, h, …); gives the dtype and the device.
        causality: which tokens each token sees.
        visible: (b, l), False for hidden tokens; None: all tokens are visible.
    """
    if visible is None:
        return count_visible_tokens(like, causality)[None, :, None, None]
    numbers = visible.to(like.dtype)
    numbers = numbers.cumsum(1) if causality == "causal" else numbers.sum(1, keepdim=True)
    return numbers[..., None, None]
