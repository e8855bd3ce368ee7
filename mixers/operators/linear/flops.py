"""The number of operations of linear attention."""

from __future__ import annotations

from mixers.operators.linear.chunks import chunk_size
from mixers.traits import Causality


def flops(length: int, k: int, v: int, causality: Causality, decay: str, sharing: int = 1) -> int:
    """Return multiply-adds × 2 of the chunked formulation for one head; elementwise work is not counted.

    Args:
        length: number of tokens.
        k: channels of queries and keys.
        v: channels of the values; a normalized pass with an order has one more.
        causality: as in `linear_attention`.
        decay: `none`, `scalar` (one gate per token and head) or `vector` (one per channel).
        sharing: how many heads share one q and one k, whose products are computed once. With one gate per channel
            every head computes its own.
    """
    state_products = 4 * length * k * v
    if causality == "noncausal" or (causality == "bidirectional" and decay == "none"):
        return state_products
    chunk = chunk_size(k, v)
    # With a gate per channel the scores come from halves of a chunk: products over c/2, c/4, … 1 tokens, in all
    # c/2 + c/4 + … + 1 = c − 1 per token.
    scores = length * k * (chunk - 1) if decay == "vector" else 2 * length * k * chunk // sharing
    return (state_products + scores + 2 * length * chunk * v) * (2 if causality == "bidirectional" else 1)
