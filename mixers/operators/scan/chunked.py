"""In blocks of tokens, and inside a block all chunks of a few tokens at once.

The states of a block are found in three strokes: every chunk of c tokens by itself, token by token, all chunks side
by side; then the states at the chunks' ends, which are a scan again, l/c tokens long, whose steps are the chunks'
times Σ dt; then what each token has left of the state before its chunk:

    S_t = inside_t + exp(A Σ_{s ≤ t, same chunk} dt_s) · S_before

Decays are exponentials of A times a sum of dt within one chunk, so every exponent is ≤ 0 whatever dt is, none is a
difference, and small decays next to large ones are not lost.

A block holds its states (l, v, n); from block to block goes one state, and gradients run a block once more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mixers.operators.common import both_directions
from mixers.operators.opaque import opaque

CHUNK = 16
SHORTEST_BLOCK = 64
BLOCK_ELEMENTS = 1 << 18  # of the states of a block: they stay in the cache of one core


class _Scan(torch.autograd.Function):
    """The blocks one after another. Gradients run each block once more, the last block first.

    Written out rather than with torch.utils.checkpoint: results and gradients have their place before the first
    block, so a block frees all it allocates. Small tensors that stay between large ones that go fragment the heap,
    which then grows as if every state were kept.
    """

    @staticmethod
    def forward(ctx, dt, A, B, C, u, memory, diagonal):  # type: ignore[no-untyped-def]
        places = _blocks(u, memory)
        y, before = torch.empty_like(u), memory.new_empty(len(places), *memory.shape)
        for i, place in enumerate(places):
            before[i] = memory
            y[:, place], memory = _scan_block(dt[:, place], A, B[:, place], C[:, place], u[:, place], memory, diagonal)
        ctx.save_for_backward(dt, A, B, C, u, before)
        ctx.places, ctx.diagonal = places, diagonal
        return y, memory.clone()  # a view would keep all states of the last block alive

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, carried):  # type: ignore[no-untyped-def]
        dt, A, B, C, u, before = ctx.saved_tensors
        d_dt, d_B, d_C, d_u = (torch.empty_like(t) for t in (dt, B, C, u))
        d_A = torch.zeros_like(A)
        for i, place in reversed(list(enumerate(ctx.places))):
            block = (dt[:, place], A, B[:, place], C[:, place], u[:, place], before[i])
            d_dt[:, place], rate, d_B[:, place], d_C[:, place], d_u[:, place], carried = _gradients(
                partial(_scan_block, diagonal=ctx.diagonal), block, (dy[:, place], carried)
            )
            d_A += rate
        return d_dt, d_A, d_B, d_C, d_u, carried, None


class _WeightedMean(torch.autograd.Function):
    """mean_j exp(dt_j A) dt_j u_j B_jᵀ, (b, h, v, n), block by block in the same way."""

    @staticmethod
    def forward(ctx, dt, A, B, u):  # type: ignore[no-untyped-def]
        total = u.new_zeros(u.shape[0], *A.shape)
        ctx.places = _blocks(u, total)
        for place in ctx.places:
            total += _weigh_block(dt[:, place], A, B[:, place], u[:, place])
        ctx.save_for_backward(dt, A, B, u)
        return total / u.shape[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_mean):  # type: ignore[no-untyped-def]
        dt, A, B, u = ctx.saved_tensors
        d_dt, d_B, d_u = (torch.empty_like(t) for t in (dt, B, u))
        d_A, d_total = torch.zeros_like(A), d_mean / u.shape[1]
        for place in ctx.places:
            block = (dt[:, place], A, B[:, place], u[:, place])
            d_dt[:, place], rate, d_B[:, place], d_u[:, place] = _gradients(_weigh_block, block, (d_total,))
            d_A += rate
        return d_dt, d_A, d_B, d_u


def _causal(
    dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor, memory: Tensor, diagonal: bool = True
) -> tuple[Tensor, Tensor]:
    return _Scan.apply(dt, A, B, C, u, memory, diagonal)


causal = opaque("selective_scan_chunked", _causal)
"""Decayed sums over tokens 0 … i and over the memory, and the memory after the last. O(l·v·n) time.

(dt: (b, l, h, v), A: (h, v, n), B, C: (b, l, h, n), u: (b, l, h, v), memory: (b, h, v, n), diagonal) -> the two.
Memory: O(l·(v + n)), and the states of one block; backward too, besides one state a block.
"""


def bidirectional(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
    """Sums over all tokens, decayed in both directions, (b, l, h, v)."""
    memory = u.new_zeros(u.shape[0], *A.shape)
    return both_directions(
        lambda dt, B, C, u, diagonal: causal(dt, A, B, C, u, memory, diagonal=diagonal)[0],
        *(dt, B, C, u),
    )


def _noncausal(
    dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor, memory: Tensor, diagonal: bool = True
) -> tuple[Tensor, Tensor]:
    memory = memory + _WeightedMean.apply(dt, A, B, u)
    return torch.einsum("blhn,bhvn->blhv", C, memory), memory


_weighted_means = opaque("selective_scan_noncausal", _noncausal)


def noncausal(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
    """Means over all tokens, (b, l, h, v): M = mean_j exp(dt_j A) dt_j u_j B_jᵀ, y_i = M C_i."""
    return _weighted_means(dt, A, B, C, u, u.new_zeros(u.shape[0], *A.shape))[0]


def _scan_block(
    dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor, memory: Tensor, diagonal: bool
) -> tuple[Tensor, Tensor]:
    """The tokens of one block, (b, l, h, v), and the memory after it."""
    dt, u, B, C = _over_channels(dt), _over_channels(u), _over_states(B), _over_states(C)
    after = _states(A[..., None], dt, dt * u * B, memory)
    seen = after
    if not diagonal:  # taking the token's own addition off again would cancel
        seen = (A[..., None] * dt).exp() * torch.cat([memory[..., None], after[..., :-1]], dim=-1)
    return (C * seen).sum(-2).permute(0, 3, 1, 2), after[..., -1]


def _states(A: Tensor, dt: Tensor, x: Tensor, memory: Tensor) -> Tensor:
    """S_t = exp(dt_t A) S_{t−1} + x_t for every token, along the last axis.

    A, dt and x broadcast to (…, l), x is of that shape, memory (…) is the state before the first token.
    """
    length = x.shape[-1]
    if length <= CHUNK:
        states = []
        for gate, addition in zip((A * dt).exp().unbind(-1), x.unbind(-1), strict=True):
            memory = torch.addcmul(addition, gate, memory)
            states.append(memory)
        return torch.stack(states, dim=-1)
    # Zeros at the end add nothing and decay nothing.
    dt, x = (F.pad(t, (0, -length % CHUNK)).unflatten(-1, (-1, CHUNK)) for t in (dt, x))
    inside = _states(A[..., None], dt, x, torch.zeros_like(x[..., 0]))
    ends = _states(A, dt.sum(-1), inside[..., -1], memory)
    before = torch.cat([memory[..., None], ends[..., :-1]], dim=-1)
    left = (A[..., None] * dt.cumsum(-1)).exp()
    return torch.addcmul(inside, left, before[..., None]).flatten(-2)[..., :length]


def _weigh_block(dt: Tensor, A: Tensor, B: Tensor, u: Tensor) -> Tensor:
    """Σ_j exp(dt_j A) dt_j u_j B_jᵀ over the tokens of one block, (b, h, v, n)."""
    dt, u, B = _over_channels(dt), _over_channels(u), _over_states(B)
    return ((A[..., None] * dt).exp() * (dt * u) * B).sum(-1)


def _gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradients of the inputs from those of the outputs: runs the function once more."""
    with torch.enable_grad():
        inputs = tuple(t.detach().requires_grad_() for t in inputs)
        results = function(*inputs)
    return torch.autograd.grad(results, inputs, outputs)


def _blocks(u: Tensor, memory: Tensor) -> list[slice]:
    """The tokens of each block, whose states have about BLOCK_ELEMENTS elements."""
    tokens = max(SHORTEST_BLOCK, BLOCK_ELEMENTS // max(1, memory.numel()))
    return [slice(start, start + tokens) for start in range(0, u.shape[1], tokens)]


def _over_channels(x: Tensor) -> Tensor:
    """(b, l, h, v) -> (b, h, v, 1, l): tokens last, side by side in memory."""
    return x.permute(0, 2, 3, 1)[..., None, :].contiguous()


def _over_states(x: Tensor) -> Tensor:
    """(b, l, h, n) -> (b, h, 1, n, l)."""
    return x.permute(0, 2, 3, 1)[:, :, None].contiguous()
