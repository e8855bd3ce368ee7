"""Passes in two directions, and sums of log decays between tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def sum_both_directions(causal: Callable[..., Tensor], *streams: Tensor) -> Tensor:
    """Add a causal pass and a strictly anti-causal one, so that the diagonal counts once: (b, l, h, ·).

    Args:
        causal: called as causal(*streams, diagonal=…); with diagonal=False a token does not see itself. In reversed
            order each token decays the state with its own gate before it reads, which gives the reverse pass
            L_ij = ∏_{t=i..j−1} a_t for j > i.
        streams: (b, l, …) each.
    """
    forward = causal(*streams, diagonal=True)
    return forward + causal(*(s.flip(1) for s in streams), diagonal=False).flip(1)


def delay_one_token(x: Tensor) -> Tensor:
    """Move every token's stream (b, l, …) to the next token; the first token gets zeros.

    In a causal pass over delayed streams, the memory at token i is that after token i − 1. A query that already
    contains token i's own decay and erasure thus reads a pass in which no token sees itself, without any subtraction.
    """
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def advance_one_token(x: Tensor) -> Tensor:
    """Move every token's stream (b, l, …) to the token before it; the last token gets zeros.

    Advanced queries read the memory after token i − 1 for token i; `delay_one_token` moves the results back.
    """
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


def segment_sums(log_decay: Tensor) -> Tensor:
    """Return Σ_{t=j+1..i} g_t for j ≤ i, and 0 for j > i: (…, c, 1) -> (…, c, c).

    Each sum is computed by itself: a difference of running sums would lose small terms next to large ones.
    """
    return log_decay.expand(*log_decay.shape[:-1], log_decay.shape[-2]).tril(-1).cumsum(-2)
