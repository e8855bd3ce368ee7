"""Scores within a chunk of tokens for one gate per token and key channel, exact for any decay.

The lower triangle of W is assembled from halves. For a part of the chunk whose second half starts at m, and gates a_t,

    i ≥ m > j:   W_ij = Σ_k  q_ik ∏_{t=m..i} a_tk  ·  k_jk ∏_{t=j+1..m−1} a_tk

is one matrix product, and both halves are parts again, down to the diagonal. From each level to the next, with parts
twice as long, half of the queries and half of the keys are multiplied by one more gate product, that of the other half
as a whole. Nothing is ever divided and no exponent is a difference, so that small decays next to large ones are not
lost. There are log₂ c levels, each O(l·k) besides its products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.function_transforms import needs_plain_operations


def scores_within_chunks(q: Tensor, k: Tensor, gates: Tensor, diagonal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return W within chunks of c = 2^n tokens, for a gate per channel: q, k and gates are (…, c, k).

    Returns:
        W (…, c, c); q times all gates up to its own; k times all gates after its own; the product of all gates of a
        chunk, (…, k, 1).
    """
    if needs_plain_operations():  # scores that are written below have to be batched if q or k are
        gates = torch.where(torch.ones_like(gates, dtype=torch.bool), gates, q * k)
    scores = gates.new_zeros(*gates.shape[:-1], gates.shape[-2])
    if diagonal:
        scores.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
    rows = q * gates
    columns = k
    half = 1
    while half < q.shape[-2]:
        rows, columns, gates = (_pair_halves(t, n) for t, n in ((rows, half), (columns, half), (gates, 1)))
        _lower_quarters(scores, half).copy_(rows[..., 1, :, :] @ columns[..., 0, :, :].mT)
        first, second = gates.unbind(-3)
        one = torch.ones_like(first)
        rows = (rows * torch.stack([one, first], -3)).flatten(-4, -2)
        columns = (columns * torch.stack([second, one], -3)).flatten(-4, -2)
        gates = (first * second).squeeze(-2)
        half = 2 * half
    return scores, rows, columns, gates.mT


def _pair_halves(x: Tensor, half: int) -> Tensor:
    """(…, c, ·) -> (…, c / (2·half), 2, half, ·): the first and the second half of every part of 2·half."""
    return x.unflatten(-2, (-1, 2, half))


def _lower_quarters(scores: Tensor, half: int) -> Tensor:
    """(…, c, c) -> (…, c / (2·half), half, half): the lower left quarter of each square of 2·half on the diagonal."""
    squares = scores.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))
    return squares[..., :, 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
