"""Blocks of c tokens in matrix products (the WY form of 2406.06484, with the gates of 2412.06464), the state between.

Inside a block that starts from the state S, with D_ij = exp(Σ_{t=j+1..i} g_t) and d_i = exp(Σ_{t≤i} g_t),

    S_i = d_i S + Σ_{j≤i} D_ij k_j u_jᵀ,    u_i = β_i (v_i − d_i k_iᵀ S − Σ_{j<i} D_ij (k_i·k_j) u_j):

what a token really writes is its value less what is under its key already. That is a triangular system for all u of
the block, linear in S: solved once for V and once for K, it makes a block an affine map of S,

    U = U' − W S,   Y = Y' + R S,   S_next = M S + N,

all of it known without S, for many blocks at once. What is left between blocks is one small product each. Exponents are
sums of log decays, so they are ≤ 0 whatever the decays are, and each is summed by itself, so that small ones next to
large ones are not lost.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mixers.operators.common import both_directions, segment_sums
from mixers.operators.opaque import opaque

CHUNK = 32
GROUP_ELEMENTS = 1 << 17  # of the c × c systems that are set up at once: all of them would not stay in a cache


def _causal(
    q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor, memory: Tensor, diagonal: bool = True
) -> tuple[Tensor, Tensor]:
    b, length, h, _ = q.shape
    chunk = min(CHUNK, length)
    if not diagonal:  # the query of the erased memory, qᵀ (I − β k kᵀ); taking off the own value again would cancel
        q = q - (beta * (q * k).sum(-1))[..., None] * k
    streams = [_blocks(t, chunk) for t in (q, k, beta[..., None], log_decay[..., None], v)]
    at_once = max(1, GROUP_ELEMENTS // max(1, b * h * chunk * chunk))
    results, memory = [], memory.flatten(0, 1)
    for q, k, beta, g, v in zip(*(t.split(at_once) for t in streams), strict=True):
        result, memory = _group(q, k, beta, g, v, memory, diagonal)
        results.append(result)
    y = rearrange(torch.cat(results), "n (b h) c v -> b (n c) h v", h=h)
    return y[:, :length], memory.unflatten(0, (b, h))


causal = opaque("delta_rule_chunked", _causal)
"""What tokens read of tokens 0 … i and of the memory, and the memory after the last. O(l·(c + k)·(k + v)).

(q, k: (b, l, h, k), beta, log_decay: (b, l, h), v: (b, l, h, v), memory: (b, h, k, v), diagonal) -> the two. Without
the diagonal a token reads the memory that it decayed and erased, before it writes.
Memory: O(l·(c + k + v)) and l/c matrices of k × k and k × v; no l × k × v tensor, backward neither.
"""


def bidirectional(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor) -> Tensor:
    """What tokens read in both directions, (b, l, h, v)."""
    memory = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
    return both_directions(
        lambda q, k, beta, g, v, diagonal: causal(q, k, beta, g, v, memory, diagonal=diagonal)[0],
        *(q, k, beta, log_decay, v),
    )


def _group(
    q: Tensor, k: Tensor, beta: Tensor, g: Tensor, v: Tensor, memory: Tensor, diagonal: bool
) -> tuple[Tensor, Tensor]:
    """What tokens of consecutive blocks read, (n, b·h, c, v), and the memory after them, (b·h, k, v).

    q, k: (n, b·h, c, k), beta, g: (n, b·h, c, 1), v: (n, b·h, c, v), memory: (b·h, k, v).
    """
    steps = segment_sums(g)
    decay = steps.exp().tril()
    since_start = g.cumsum(-2).exp()
    to_end = steps[..., -1, :, None].exp()
    system = beta * (k @ k.mT) * decay
    right = torch.cat([beta * v, beta * since_start * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    written, erased = solved.split([v.shape[-1], k.shape[-1]], dim=-1)  # U' and W
    reading = (q @ k.mT * decay).tril(0 if diagonal else -1)
    keys = (k * to_end).mT
    identity = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    states, memory = _between(since_start[..., -1:, :] * identity - keys @ erased, keys @ written, memory)
    return reading @ written + (q * since_start - reading @ erased) @ states, memory


def _between(maps: Tensor, additions: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """S ← M S + N over the blocks: the states before each, (n, b·h, k, v), and the one after the last."""
    before = []
    for step, addition in zip(maps.unbind(0), additions.unbind(0), strict=True):
        before.append(memory)
        memory = torch.baddbmm(addition, step, memory)
    return torch.stack(before), memory


def _blocks(x: Tensor, chunk: int) -> Tensor:
    """(b, l, h, ·) -> (n, b·h, c, ·); padded with zeros, which write, erase and decay nothing."""
    padded = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return rearrange(padded, "b (n c) h x -> n (b h) c x", c=chunk)
