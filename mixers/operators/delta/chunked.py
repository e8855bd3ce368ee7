"""The delta rule in blocks of c tokens: matrix products (the WY form of 2406.06484), one state between blocks.

Inside a block that starts from the state S, with D_ij = exp(Σ_{t=j+1..i} g_t) and d_i = exp(Σ_{t≤i} g_t),

    S_i = d_i ⊙ S + Σ_{j≤i} (D_ij ⊙ k_j) u_jᵀ,    u_i = β_i (v_i − (d_i ⊙ k_i)ᵀ S − Σ_{j<i} k_iᵀ (D_ij ⊙ k_j) u_j):

a token writes its value minus what is stored under its key already (gates as in 2412.06464 or, one per key channel, in
2510.26692). That is a triangular system for all u of the block, linear in S. Solved once for V and once for K, it makes
a block an affine map of S,

    U = U' − W S,   Y = Y' + R S,   S_next = M S + N,

whose coefficients do not depend on S, for many blocks at once. Between blocks one small product each is left.
Exponents are sums of log decays, so they are ≤ 0 whatever the decays are, and each is summed by itself, so that small
ones next to large ones are not lost.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mixers.operators import blockwise
from mixers.operators.backend import register_backend
from mixers.operators.channel_gates import scores_within_chunks
from mixers.operators.compilation import as_graph_node
from mixers.operators.delta.backend import DeltaRuleBackend, empty_memory
from mixers.operators.directions import segment_sums, sum_both_directions

CHUNK = 32


@register_backend("chunked")
class ChunkedDeltaRule(DeltaRuleBackend):
    """Blocks of tokens in matrix products, with one state between them; computes every call."""

    def causal(
        self, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what tokens read of tokens 0 … i and the memory, (b, l, h, v), and the final memory (b, h, k, v)."""
        return read_causally(q, k, beta, log_decay, v, memory)

    def bidirectional(self, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor) -> Tensor:
        """Return what tokens read in both directions, (b, l, h, v)."""
        memory = empty_memory(k, v)
        return sum_both_directions(
            lambda q, k, beta, g, v, diagonal: read_causally(q, k, beta, g, v, memory, diagonal=diagonal)[0],
            q,
            k,
            beta,
            log_decay,
            v,
        )

    def noncausal(self, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor) -> Tensor:
        """Return what tokens read after one step on all tokens at once, (b, l, h, v).

        Keys are divided before the sums, so that millions of them stay finite.
        """
        write_keys = beta[..., None] * log_decay.exp() * k / k.shape[1]
        written = torch.einsum("blhk,blhv->bhkv", write_keys, v)
        erasure = torch.einsum("blhk,blhn->bhkn", write_keys, k)
        return torch.einsum("blhk,bhkv->blhv", q, 2 * written - erasure @ written)


def _read_causally(
    q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor, memory: Tensor, diagonal: bool = True
) -> tuple[Tensor, Tensor]:
    b, length, h, _ = q.shape
    chunk = min(CHUNK, 1 << (length - 1).bit_length())  # a power of two: halves of a block are combined
    if not diagonal:  # the query of the erased memory, qᵀ (I − β k kᵀ): subtracting the own value would cancel
        q = q - (beta * (q * k).sum(-1))[..., None] * k
    streams = [_split_blocks(t, chunk) for t in (q, k, beta[..., None], log_decay, v)]
    # Not all c × c systems are set up at once, because they would not stay in a cache.
    blocks_per_group = max(1, blockwise.BLOCK_ELEMENTS // 2 // max(1, b * h * chunk * chunk))
    results = []
    memory = memory.flatten(0, 1)
    for q, k, beta, g, v in zip(*(t.split(blocks_per_group) for t in streams), strict=True):
        result, memory = _read_group(q, k, beta, g, v, memory, diagonal)
        results.append(result)
    y = rearrange(torch.cat(results), "n (b h) c v -> b (n c) h v", h=h)
    return y[:, :length], memory.unflatten(0, (b, h))


read_causally = as_graph_node("delta_rule_chunked", _read_causally)
"""(q, k: (b, l, h, k), beta: (b, l, h), log_decay: (b, l, h, 1 or k), v: (b, l, h, v), memory: (b, h, k, v), diagonal)
-> what tokens read of tokens 0 … i and of the memory, and the final memory. O(l·(c + k)·(k + v)). With diagonal=False a
token reads the memory that it decayed and erased, before it writes. Memory: O(l·(c + k + v)) and l/c matrices of k × k
and k × v; no l × k × v tensor, in the backward pass neither.
"""


def _read_group(
    q: Tensor, k: Tensor, beta: Tensor, g: Tensor, v: Tensor, memory: Tensor, diagonal: bool
) -> tuple[Tensor, Tensor]:
    """Return what tokens of consecutive blocks read, (n, b·h, c, v), and the memory after them, (b·h, k, v).

    q, k: (n, b·h, c, k), beta: (n, b·h, c, 1), g: (n, b·h, c, 1 or k), v: (n, b·h, c, v), memory: (b·h, k, v).
    """
    products = _products_per_channel if g.shape[-1] > 1 else _products_per_token
    overlaps, scores, queries, own_keys, last_keys, total = products(q, k, g, diagonal)
    right_sides = torch.cat([beta * v, beta * own_keys], dim=-1)
    solution = torch.linalg.solve_triangular(beta * overlaps, right_sides, upper=False, unitriangular=True)
    written, erased = solution.split([v.shape[-1], k.shape[-1]], dim=-1)  # U' and W
    identity = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    maps = total * identity - last_keys.mT @ erased
    states, memory = _carry_states(maps, last_keys.mT @ written, memory)
    return scores @ written + (queries - scores @ erased) @ states, memory


def _products_per_token(q: Tensor, k: Tensor, g: Tensor, diagonal: bool) -> tuple[Tensor, ...]:
    """Return the decayed products within blocks for one gate per token.

    Returns:
        k_iᵀ (D_ij ⊙ k_j), of which only j < i is used, and q_iᵀ (D_ij ⊙ k_j), (…, c, c); d_i ⊙ q_i and d_i ⊙ k_i;
        k_i decayed to the end of the block; the product of all gates of the block, (…, 1 or k, 1).
    """
    steps = segment_sums(g)
    decay = steps.exp().tril()
    since_start = g.cumsum(-2).exp()
    to_end = steps[..., -1, :, None].exp()
    scores = (q @ k.mT * decay).tril(0 if diagonal else -1)
    return (k @ k.mT) * decay, scores, since_start * q, since_start * k, to_end * k, since_start[..., -1:, :]


def _products_per_channel(q: Tensor, k: Tensor, g: Tensor, diagonal: bool) -> tuple[Tensor, ...]:
    """Return the same for one gate per key channel."""
    gates = g.exp()
    overlaps, own_keys, last_keys, total = scores_within_chunks(k, k, gates, diagonal=False)
    scores, queries, _, _ = scores_within_chunks(q, k, gates, diagonal)
    return overlaps, scores, queries, own_keys, last_keys, total


def _carry_states(maps: Tensor, additions: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Apply S ← M S + N block by block; returns the states before each, (n, b·h, k, v), and the one after the last."""
    before = []
    for step, addition in zip(maps.unbind(0), additions.unbind(0), strict=True):
        before.append(memory)
        memory = torch.baddbmm(addition, step, memory)
    return torch.stack(before), memory


def _split_blocks(x: Tensor, chunk: int) -> Tensor:
    """(b, l, h, ·) -> (n, b·h, c, ·); padded with zeros, which write, erase and decay nothing."""
    padded = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return rearrange(padded, "b (n c) h x -> n (b h) c x", c=chunk)
