"""Matrix products only: two of them where there is no order, chunks of c tokens and the state between where there is.

With one gate a token, the weights inside a chunk are those without, times a mask of decays. With one a channel the
lower triangle of W is put together by halves. For a part of the chunk whose second half starts at m, and gates a_t,

    i ≥ m > j:   W_ij = Σ_k  q_ik ∏_{t=m..i} a_tk  ·  k_jk ∏_{t=j+1..m−1} a_tk

is one matrix product, and both halves are parts again, down to the diagonal. From part to part twice as long, half of
the queries and half of the keys are multiplied by one gate more each, that of the other half as a whole. Nothing is
ever divided and no exponent is a difference, so that small decays next to large ones are not lost. log₂ c levels, each
O(l·k) besides its products.

The chunks go in blocks that stay in the cache; from block to block goes one state, and gradients run a block once more.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mixers.operators.blocks import block_after_block
from mixers.operators.common import both_directions, segment_sums
from mixers.operators.opaque import opaque

CHUNK = 32  # tokens
WIDE = 64  # channels beyond which chunks are twice as long: a state costs more than the weights of a chunk
BLOCK_ELEMENTS = 1 << 18  # of the queries of a block, or the values: they stay in the cache


def chunk_size(k: int, v: int) -> int:
    """Tokens of a chunk for heads of k and v channels, a power of two; measured."""
    return CHUNK if max(k, v) <= WIDE else 2 * CHUNK


def noncausal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Means over all tokens, (b, l, h, v): M = mean_j k_j v_jᵀ, y_i = q_i M. O(l·k·v).

    Keys are divided before the sum, so that millions of them stay finite.
    """
    memory = torch.einsum("blhk,blhv->bhkv", k / k.shape[1], v)
    return torch.einsum("blhk,bhkv->blhv", q, memory)


def causal(q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Decayed sums over tokens 0 … i and over the memory, (b, l, h, v), and the memory after the last."""
    return undecayed(q, k, v, memory) if log_decay is None else decayed(q, k, log_decay, v, memory)


def _undecayed(q: Tensor, k: Tensor, v: Tensor, memory: Tensor, diagonal: bool = True) -> tuple[Tensor, Tensor]:
    step = partial(_step, diagonal=diagonal)
    return block_after_block(step, tokens_a_block(q, v), (q, k, v), memory)


def _decayed(
    q: Tensor, k: Tensor, log_decay: Tensor, v: Tensor, memory: Tensor, diagonal: bool = True
) -> tuple[Tensor, Tensor]:
    step = partial(block, diagonal=diagonal)
    return block_after_block(step, tokens_a_block(q, v), (q, k, log_decay, v), memory)


def _step(q: Tensor, k: Tensor, v: Tensor, memory: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
    return block(q, k, None, v, memory, diagonal)


undecayed = opaque("linear_attention_undecayed", _undecayed)
"""Sums over tokens 0 … i and over the memory, and the memory after the last. O(l·(c + k)·v)."""

decayed = opaque("linear_attention_chunked", _decayed)
"""Decayed sums over tokens 0 … i and over the memory, and the memory after the last. O(l·(c + k)·v).

(q, k: (b, l, h, k), log_decay: (b, l, h, 1 or k), v: (b, l, h, v), memory: (b, h, k, v), diagonal) -> the two.
Memory: what a block of tokens needs and a state a block; backward too, besides the gradients.
"""


def tokens_a_block(q: Tensor, v: Tensor) -> int:
    """Tokens of a block, whole chunks: on a CPU about BLOCK_ELEMENTS features, elsewhere all there are."""
    chunk = chunk_size(q.shape[3], v.shape[3])
    most = BLOCK_ELEMENTS // max(1, q.shape[0] * q.shape[2] * max(q.shape[3], v.shape[3]))
    return max(chunk, most // chunk * chunk) if q.device.type == "cpu" else q.shape[1]


def block(
    q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor, memory: Tensor, diagonal: bool
) -> tuple[Tensor, Tensor]:
    """The sums of a block of tokens after a memory, and the memory after them, all chunks of it at once.

    Heads that share queries or keys may come as one, (b, l, 1, k).
    """
    length = q.shape[1]
    chunk = min(chunk_size(q.shape[3], v.shape[3]), 1 << (length - 1).bit_length())
    q, k, v = (_chunks(t, chunk) for t in (q, k, v))
    g = None if log_decay is None else _chunks(log_decay, chunk)
    if g is not None and g.shape[-1] > 1:
        weights, read, written, kept = inside(q, k, g.exp(), diagonal)
        before, memory = _states(written.mT @ v, kept, memory)
        return _together(weights @ v + read @ before, length), memory
    weights = (q @ k.mT).tril(0 if diagonal else -1)
    if g is None:
        before, memory = _states(k.mT @ v, None, memory)
        return _together(weights @ v + q @ before, length), memory
    steps = segment_sums(g).exp_()
    since_start, to_end = g.cumsum(-2).exp_(), steps[..., -1, :, None]
    before, memory = _states(k.mT @ (v * to_end), since_start[..., -1:, :], memory)
    return _together(torch.addcmul((weights * steps) @ v, since_start, q @ before), length), memory


def inside(q: Tensor, k: Tensor, gates: Tensor, diagonal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W within chunks, (…, c, c), for q, k and gates (…, c, k); c is a power of two.

    Also, of every chunk, q times all gates up to it, k times all gates after it, and the product of all, (…, k, 1).
    """
    weights = gates.new_zeros(*gates.shape[:-1], gates.shape[-2])
    if diagonal:
        weights.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
    rows, columns, half = q * gates, k, 1
    while half < q.shape[-2]:
        rows, columns, gates = (_pairs(t, n) for t, n in ((rows, half), (columns, half), (gates, 1)))
        _lower(weights, half).copy_(rows[..., 1, :, :] @ columns[..., 0, :, :].mT)
        first, second = gates.unbind(-3)
        one = torch.ones_like(first)
        rows = (rows * torch.stack([one, first], -3)).flatten(-4, -2)
        columns = (columns * torch.stack([second, one], -3)).flatten(-4, -2)
        gates, half = (first * second).squeeze(-2), 2 * half
    return weights, rows, columns, gates.mT


def _pairs(x: Tensor, half: int) -> Tensor:
    """(…, c, ·) -> (…, c / (2·half), 2, half, ·): the first and the second half of every part of 2·half."""
    return x.unflatten(-2, (-1, 2, half))


def _lower(weights: Tensor, half: int) -> Tensor:
    """(…, c, c) -> (…, c / (2·half), half, half): of each square of 2·half on the diagonal the lower left quarter."""
    squares = weights.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))
    return squares[..., :, 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _states(additions: Tensor, kept: Tensor | None, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk, (n, b, h, k, v), and the one after the last, (b, h, k, v)."""
    before = []
    for i, addition in enumerate(additions.unbind(0)):
        before.append(memory)
        memory = memory + addition if kept is None else torch.addcmul(addition, kept[i], memory)
    return torch.stack(before), memory


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """(b, l, h, ·) -> (n, b, h, c, ·); padded with zeros, which add nothing and decay nothing."""
    rest = -x.shape[1] % chunk
    padded = F.pad(x, (0, 0, 0, 0, 0, rest)) if rest else x
    return rearrange(padded, "b (n c) h x -> n b h c x", c=chunk).contiguous()


def _together(x: Tensor, length: int) -> Tensor:
    """(n, b, h, c, ·) -> (b, l, h, ·)."""
    return rearrange(x, "n b h c x -> b (n c) h x")[:, :length]


def bidirectional(q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor) -> Tensor:
    """Sums over all tokens, decayed in both directions, (b, l, h, v). Without decay: the two products."""
    if log_decay is None:
        return noncausal(q, k, v) * q.shape[1]
    memory = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
    return both_directions(
        lambda q, k, g, v, diagonal: decayed(q, k, g, v, memory, diagonal=diagonal)[0], q, k, log_decay, v
    )
