"""Sums over tokens 0 … i in chunks of c tokens: matrix products within a chunk, one state between chunks.

With one gate per token, the scores inside a chunk are those without decay, times a mask. With one gate per channel,
they are assembled from halves (`mixers.operators.channel_gates`).

Chunks are computed in blocks that stay in the cache; one state goes from block to block, and gradients run a block once
more.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mixers.operators import blockwise
from mixers.operators.blockwise import scan_blocks
from mixers.operators.channel_gates import scores_within_chunks
from mixers.operators.compilation import as_graph_node
from mixers.operators.directions import segment_sums

CHUNK = 32  # tokens
WIDE = 64  # channels beyond which chunks are twice as long: a state costs more than the scores of a chunk


def chunk_size(k: int, v: int) -> int:
    """Return the tokens per chunk for heads of k and v channels, a power of two; measured."""
    return CHUNK if max(k, v) <= WIDE else 2 * CHUNK


def block_length(q: Tensor, v: Tensor, more_channels: int = 0) -> int:
    """Return the tokens per block, whole chunks: on a CPU as many as stay in the cache, elsewhere all.

    Args:
        q: (b, l, h, k), or (b, l, 1, k) if all heads share it.
        v: (b, l, h, v).
        more_channels: of the values in the sums, such as one for the row sums.
    """
    width = v.shape[3] + more_channels
    chunk = chunk_size(q.shape[3], width)
    tokens = blockwise.BLOCK_ELEMENTS // max(1, v.shape[0] * v.shape[2] * max(q.shape[3], width))
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
