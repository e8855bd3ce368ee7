"""Sums over tokens 0 … i in chunks of c tokens: matrix products within a chunk, one state between chunks.

With one gate per token, the scores inside a chunk are those without decay, times a mask. With one gate per channel,
the lower triangle of W is assembled from halves. For a part of the chunk whose second half starts at m, and gates a_t,

    i ≥ m > j:   W_ij = Σ_k  q_ik ∏_{t=m..i} a_tk  ·  k_jk ∏_{t=j+1..m−1} a_tk

is one matrix product, and both halves are parts again, down to the diagonal. From each level to the next, with parts
twice as long, half of the queries and half of the keys are multiplied by one more gate product, that of the other half
as a whole. Nothing is ever divided and no exponent is a difference, so that small decays next to large ones are not
lost. There are log₂ c levels, each O(l·k) besides its products.

Chunks are computed in blocks that stay in the cache; one state goes from block to block, and gradients run a block once
more.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mixers.function_transforms import needs_plain_operations
from mixers.operators import blockwise
from mixers.operators.blockwise import scan_blocks
from mixers.operators.compilation import as_graph_node
from mixers.operators.directions import segment_sums

CHUNK = 32  # tokens
WIDE = 64  # channels beyond which chunks are twice as long: a state costs more than the scores of a chunk


def chunk_size(k: int, v: int) -> int:
    """Return the tokens per chunk for heads of k and v channels, a power of two; measured."""
    return CHUNK if max(k, v) <= WIDE else 2 * CHUNK


def block_length(q: Tensor, v: Tensor) -> int:
    """Return the tokens per block, whole chunks: on a CPU as many as stay in the cache, elsewhere all."""
    chunk = chunk_size(q.shape[3], v.shape[3])
    tokens = blockwise.BLOCK_ELEMENTS // max(1, q.shape[0] * q.shape[2] * max(q.shape[3], v.shape[3]))
    return max(chunk, tokens // chunk * chunk) if q.device.type == "cpu" else q.shape[1]


def _sum_without_decay(q: Tensor, k: Tensor, v: Tensor, memory: Tensor, diagonal: bool = True) -> tuple[Tensor, Tensor]:
    step = partial(_mix_undecayed_chunks, diagonal=diagonal)
    return scan_blocks(step, block_length(q, v), (q, k, v), memory)


def _sum_with_decay(
    q: Tensor, k: Tensor, log_decay: Tensor, v: Tensor, memory: Tensor, diagonal: bool = True
) -> tuple[Tensor, Tensor]:
    step = partial(mix_chunks, diagonal=diagonal)
    return scan_blocks(step, block_length(q, v), (q, k, log_decay, v), memory)


def _mix_undecayed_chunks(q: Tensor, k: Tensor, v: Tensor, memory: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
    return mix_chunks(q, k, None, v, memory, diagonal)


sum_without_decay = as_graph_node("linear_attention_undecayed", _sum_without_decay)
"""(q, k: (b, l, h, k), v: (b, l, h, v), memory: (b, h, k, v), diagonal) -> sums and final memory. O(l·(c + k)·v)."""

sum_with_decay = as_graph_node("linear_attention_chunked", _sum_with_decay)
"""(q, k: (b, l, h, k), log_decay: (b, l, h, 1 or k), v: (b, l, h, v), memory: (b, h, k, v), diagonal) -> decayed sums
over tokens 0 … i and over the memory, and the final memory. O(l·(c + k)·v) time; memory for one block of tokens, and
one state per block; the backward pass likewise, besides the gradients.
"""


def mix_chunks(
    q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor, memory: Tensor, diagonal: bool
) -> tuple[Tensor, Tensor]:
    """Return the sums of a block of tokens after a memory, and the memory after it; all chunks at once.

    Queries or keys that all heads share may have one head, (b, l, 1, k). With diagonal=False a token does not see
    itself.
    """
    length = q.shape[1]
    chunk = min(chunk_size(q.shape[3], v.shape[3]), 1 << (length - 1).bit_length())
    q, k, v = (_split_chunks(t, chunk) for t in (q, k, v))
    if log_decay is None:
        scores = (q @ k.mT).tril(0 if diagonal else -1)
        before, memory = _carry_states(k.mT @ v, None, memory)
        return _join_chunks(scores @ v + q @ before, length), memory
    log_decay = _split_chunks(log_decay, chunk)
    if log_decay.shape[-1] > 1:
        scores, decayed_q, decayed_k, decay = scores_within_chunks(q, k, log_decay.exp(), diagonal)
        before, memory = _carry_states(decayed_k.mT @ v, decay, memory)
        return _join_chunks(scores @ v + decayed_q @ before, length), memory
    scores = (q @ k.mT).tril(0 if diagonal else -1)
    mask = segment_sums(log_decay).exp_()
    since_start = log_decay.cumsum(-2).exp_()
    to_end = mask[..., -1, :, None]
    before, memory = _carry_states(k.mT @ (v * to_end), since_start[..., -1:, :], memory)
    return _join_chunks(torch.addcmul((scores * mask) @ v, since_start, q @ before), length), memory


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


def _carry_states(additions: Tensor, decay: Tensor | None, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states before each chunk, (n, b, h, k, v), and the one after the last, (b, h, k, v)."""
    before = []
    for i, addition in enumerate(additions.unbind(0)):
        before.append(memory)
        memory = memory + addition if decay is None else torch.addcmul(addition, decay[i], memory)
    return torch.stack(before), memory


def _split_chunks(x: Tensor, chunk: int) -> Tensor:
    """(b, l, h, ·) -> (n, b, h, c, ·); padded with zeros, which add nothing and decay nothing."""
    missing = -x.shape[1] % chunk
    padded = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
    return rearrange(padded, "b (n c) h x -> n b h c x", c=chunk).contiguous()


def _join_chunks(x: Tensor, length: int) -> Tensor:
    """(n, b, h, c, ·) -> (b, l, h, ·)."""
    return rearrange(x, "n b h c x -> b (n c) h x")[:, :length]
