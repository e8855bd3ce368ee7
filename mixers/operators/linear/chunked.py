"""Matrix products only: two of them where there is no order, blocks of c tokens and the state between where there is.

Inside a block the lower triangle of W is taken apart by halves. For a block whose second half starts at m,

    i ≥ m > j:   W_ij = Σ_k  q_ik exp(Σ_{t=m..i} g_tk)  ·  k_jk exp(Σ_{t=j+1..m−1} g_tk)

is one matrix product, and both halves are blocks again, down to the diagonal. Both exponents are sums of log
decays, so they are ≤ 0 whatever the decays are, and each is summed by itself, so that small ones next to large
ones are not lost. log₂ c levels, each O(l·k) besides its products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mixers.operators.common import both_directions
from mixers.operators.opaque import opaque

CHUNK = 64


def noncausal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Means over all tokens, (b, l, h, v): M = mean_j k_j v_jᵀ, y_i = q_i M. O(l·k·v).

    Keys are divided before the sum, so that millions of them stay finite.
    """
    memory = torch.einsum("blhk,blhv->bhkv", k / k.shape[1], v)
    return torch.einsum("blhk,bhkv->blhv", q, memory)


def causal(q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Decayed sums over tokens 0 … i and over the memory, (b, l, h, v), and the memory after the last."""
    if log_decay is not None:
        return decayed(q, k, log_decay, v, memory)
    length = q.shape[1]
    q, k, v = (_blocks(t, CHUNK) for t in (q, k, v))
    diagonal_blocks = (q @ k.transpose(-1, -2)).tril() @ v
    additions = k.transpose(-1, -2) @ v
    totals = additions.cumsum(0) + memory
    return _tokens(diagonal_blocks + q @ (totals - additions), length), totals[-1]


def _decayed(
    q: Tensor, k: Tensor, log_decay: Tensor, v: Tensor, memory: Tensor, diagonal: bool = True
) -> tuple[Tensor, Tensor]:
    length = q.shape[1]
    chunk = min(CHUNK, 1 << (length - 1).bit_length())  # a power of two
    q, k, g, v = (_blocks(t, chunk) for t in (q, k, log_decay, v))
    sums = inside(q, k, g, v, diagonal)
    read = q * g.cumsum(-2).exp()
    additions = (k * _after(g).exp()).transpose(-1, -2) @ v
    kept = g.sum(-2)[..., None].exp()
    before = []
    for keep, addition in zip(kept.unbind(0), additions.unbind(0), strict=True):
        before.append(memory)
        memory = keep * memory + addition
    return _tokens(sums + read @ torch.stack(before), length), memory


decayed = opaque("linear_attention_chunked", _decayed)
"""Decayed sums over tokens 0 … i and over the memory, and the memory after the last. O(l·(c + k)·v).

(q, k: (b, l, h, k), log_decay: (b, l, h, 1 or k), v: (b, l, h, v), memory: (b, h, k, v), diagonal) -> the two.
Memory: O(l·k·log c) for the blocks and l/c states; no l × k × v tensor, backward neither.
"""


def bidirectional(q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor) -> Tensor:
    """Sums over all tokens, decayed in both directions, (b, l, h, v). Without decay: the two products."""
    if log_decay is None:
        return noncausal(q, k, v) * q.shape[1]
    memory = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
    return both_directions(
        lambda q, k, g, v, diagonal: decayed(q, k, g, v, memory, diagonal=diagonal)[0], q, k, log_decay, v
    )


def inside(q: Tensor, k: Tensor, g: Tensor, v: Tensor, diagonal: bool) -> Tensor:
    """W v within blocks, (…, c, k), (…, c, k), (…, c, 1 or k), (…, c, v) -> (…, c, v); c is a power of two."""
    chunk = q.shape[-2]
    sums = (q * k).sum(-1, keepdim=True) * v if diagonal else torch.zeros_like(v)
    half = chunk // 2
    while half >= 1:
        first, second = (lambda t: _half(t, half, 0)), (lambda t: _half(t, half, 1))  # noqa: B023
        rows = second(q) * second(g).cumsum(-2).exp()
        columns = first(k) * _after(first(g)).exp()
        lower = (rows @ columns.transpose(-1, -2)) @ first(v)
        sums = sums + F.pad(lower, (0, 0, half, 0)).flatten(-3, -2)
        half //= 2
    return sums


def _half(x: Tensor, half: int, which: int) -> Tensor:
    """(…, c, ·) -> (…, c / (2·half), half, ·): the first or second half of every sub-block."""
    return x.unflatten(-2, (-1, 2, half))[..., which, :, :]


def _after(g: Tensor) -> Tensor:
    """Σ_{t>j} g_t within a block, (…, c, ·): what token j decays by until the block's end."""
    later = F.pad(g[..., 1:, :], (0, 0, 0, 1))
    return later.flip(-2).cumsum(-2).flip(-2)


def _blocks(x: Tensor, chunk: int) -> Tensor:
    """(b, l, h, ·) -> (n, b, h, c, ·); padded with zeros, which add nothing and decay nothing."""
    padded = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return rearrange(padded, "b (n c) h x -> n b h c x", c=chunk)


def _tokens(x: Tensor, length: int) -> Tensor:
    """(n, b, h, c, ·) -> (b, l, h, ·)."""
    return rearrange(x, "n b h c x -> b (n c) h x")[:, :length]
