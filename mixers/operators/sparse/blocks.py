"""Softmax over the key blocks that a query block selects, and linear attention over the others (SLA, 2509.24006).

Tokens are cut into blocks of B in the order in which they come; the last block may be shorter. Sums of both kinds are
returned unnormalized, so that a mixer can divide each by its own total, or both by one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixers.precision import accumulation_dtype

BAND_ELEMENTS = 1 << 24
"""Weights of the query blocks that are computed at once."""


class AttentionSums(NamedTuple):
    """Sums over keys, in blocks of queries.

    Attributes:
        values: Σ_j w_ij v_j, (b, h, blocks, B, v).
        weights: Σ_j w_ij, (b, h, blocks, B, 1).
        maxima: largest score of each query, (b, h, blocks, B, 1), by whose exponential both sums are divided; None for
            linear attention.
    """

    values: Tensor
    weights: Tensor
    maxima: Tensor | None = None


def select_key_blocks(q: Tensor, k: Tensor, block_size: int, count: int) -> Tensor:
    """Select the key blocks whose mean key has the largest product with the mean query of each query block.

    The selection has no gradient. Costs 2·(l / B)²·k operations per head, and (l / B)² numbers of memory.

    Args:
        q: queries (b, l, h, k).
        k: keys (b, l, h, k).
        block_size: B, tokens per block.
        count: number of blocks to select, 1 … ⌈l / B⌉.

    Returns:
        Indices (b, h, blocks, count), in no particular order.
    """
    scores = _block_means(q.detach(), block_size) @ _block_means(k.detach(), block_size).mT
    return scores.topk(count, dim=-1, sorted=False).indices


def exact_sums(q: Tensor, k: Tensor, v: Tensor, selected: Tensor, block_size: int) -> AttentionSums:
    """Sum exp(q·k/√k) v over the keys of the selected blocks.

    With n selected blocks, costs 2·l·n·B·(k + v) operations per head, and memory for the weights and the gathered keys
    and values of a band of query blocks; with gradients, of all l·n·B weights.

    Args:
        q: queries (b, l, h, k).
        k: keys (b, l, h, k).
        v: values (b, l, h, v).
        selected: (b, h, blocks, n), of `select_key_blocks`.
        block_size: B, tokens per block.

    Returns:
        The sums in float32 at least, divided by the exponential of `maxima`.
    """
    queries = _split_blocks(q, block_size) / math.sqrt(q.shape[-1])
    keys = _split_blocks(k, block_size)
    values = _split_blocks(v, block_size)
    if torch.compiler.is_compiling():  # which would unroll the loop over bands
        return _exact_band(queries, keys, values, selected, k.shape[1])
    batch, heads, blocks, count = selected.shape
    band = max(1, BAND_ELEMENTS // max(1, batch * heads * count * block_size**2))
    bands = [
        _exact_band(queries[:, :, first : first + band], keys, values, selected[:, :, first : first + band], k.shape[1])
        for first in range(0, blocks, band)
    ]
    return (
        bands[0] if len(bands) == 1 else AttentionSums(*(torch.cat(parts, dim=2) for parts in zip(*bands, strict=True)))
    )


def linear_sums(
    features_q: Tensor, features_k: Tensor, v: Tensor, block_size: int, excluded: Tensor | None = None
) -> AttentionSums:
    """Sum (φ(q)·φ(k)) v over all keys, or over those outside the excluded blocks.

    Excluded blocks are subtracted from the total, as in the published kernel: float32 loses about 7 digits of the total
    by it. Costs 4·l·k·v operations per head, and memory for l / B · excluded states of k·v numbers.

    Args:
        features_q: φ(q), (b, l, h, k).
        features_k: φ(k), (b, l, h, k).
        v: values (b, l, h, v).
        block_size: B, tokens per block.
        excluded: blocks left out for each query block, (b, h, blocks, excluded); None for all keys.

    Returns:
        The sums in float32 at least.
    """
    queries = _split_blocks(features_q, block_size)
    keys = _split_blocks(features_k, block_size)
    states = keys.mT @ _split_blocks(v, block_size)  # (b, h, blocks, k, v)
    key_sums = keys.sum(3)  # (b, h, blocks, k)
    state = states.sum(2, keepdim=True)
    key_sum = key_sums.sum(2, keepdim=True)
    if excluded is not None:
        state = state - _gather_blocks(states, excluded).sum(3)
        key_sum = key_sum - _gather_blocks(key_sums, excluded).sum(3)
    return AttentionSums(queries @ state, (queries * key_sum[..., None, :]).sum(-1, keepdim=True))


def join_blocks(x: Tensor, length: int) -> Tensor:
    """Undo the split into blocks: (b, h, blocks, B, ·) -> (b, l, h, ·)."""
    return x.flatten(2, 3)[:, :, :length].transpose(1, 2)


def selected_key_mask(selected: Tensor, block_size: int, length: int) -> Tensor:
    """Return which keys the queries see exactly, (b, h, l, l), from selected blocks (b, h, blocks, n)."""
    batch, heads, blocks, _ = selected.shape
    mask = torch.zeros(batch, heads, blocks, blocks, dtype=torch.bool, device=selected.device)
    mask = mask.scatter(-1, selected, True)
    block_of = torch.arange(length, device=selected.device) // block_size
    return mask[:, :, block_of][..., block_of]


def _exact_band(queries: Tensor, keys: Tensor, values: Tensor, selected: Tensor, length: int) -> AttentionSums:
    """Sum over the selected blocks for some of the query blocks; queries are scaled, padding has no weight."""
    block_size = keys.shape[3]
    scores = queries @ _gather_blocks(keys, selected).flatten(3, 4).mT
    positions = selected[..., None] * block_size + torch.arange(block_size, device=keys.device)
    scores = scores.masked_fill((positions >= length).flatten(3)[..., None, :], -math.inf)
    maxima = scores.amax(-1, keepdim=True).detach()
    weights = (scores - maxima).exp()
    return AttentionSums(
        weights @ _gather_blocks(values, selected).flatten(3, 4), weights.sum(-1, keepdim=True), maxima
    )


def _split_blocks(x: Tensor, block_size: int) -> Tensor:
    """Split (b, l, h, ·) into (b, h, blocks, B, ·), padded with zeros, float32 at least."""
    x = x.transpose(1, 2).to(accumulation_dtype(x))
    return F.pad(x, (0, 0, 0, -x.shape[2] % block_size)).unflatten(2, (-1, block_size))


def _block_means(x: Tensor, block_size: int) -> Tensor:
    """Average the tokens of every block, (b, l, h, ·) -> (b, h, blocks, ·); padding does not count."""
    length = x.shape[1]
    sums = _split_blocks(x, block_size).sum(3)
    starts = torch.arange(0, length, block_size, device=x.device)
    return sums / (length - starts).clamp(max=block_size)[:, None]


def _gather_blocks(blocks: Tensor, selected: Tensor) -> Tensor:
    """Gather blocks (b, h, blocks, …) by indices (b, h, blocks, n): (b, h, blocks, n, …)."""
    batch, heads = selected.shape[:2]
    item = torch.arange(batch, device=selected.device)[:, None, None, None]
    head = torch.arange(heads, device=selected.device)[:, None, None]
    return blocks[item, head, selected]
