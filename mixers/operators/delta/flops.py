"""The number of operations of the delta rule."""

from __future__ import annotations

from mixers.operators.delta.chunked import CHUNK
from mixers.traits import Causality


def flops(length: int, k: int, v: int, causality: Causality, decay: str = "scalar") -> int:
    """Return multiply-adds × 2 of the chunked formulation's products for one head.

    Elementwise work is not counted, nor is solving the triangular systems, (c − 1)·(k + v) more per token, which torch
    does not count either.

    Args:
        length: number of tokens.
        k: channels of queries and keys.
        v: channels of the values; a normalized pass has one more.
        causality: as in `delta_rule`.
        decay: `none`, `scalar` (one gate per token and head) or `vector` (one per channel).
    """
    if causality == "noncausal":
        return 2 * (length * k * (k + 2 * v) + k * k * v)
    # With a gate per channel the two scores come from halves of a block: products over c/2, c/4, … 1 tokens, in all
    # c − 1 per token for both.
    scores = (CHUNK - 1) * k if decay == "vector" else 2 * CHUNK * k
    products = scores + CHUNK * (k + v) + k * (k + 2 * v)  # within blocks, and to and from the state
    between = -(-length // CHUNK) * k * k * v
    return 2 * (length * products + between) * (2 if causality == "bidirectional" else 1)
