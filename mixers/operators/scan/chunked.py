"""In blocks of tokens, the states S_t = exp(dt_t A) S_{t−1} + dt_t u_t B_tᵀ of a block one after another.

A block of more than c tokens goes in chunks of c, all side by side, each as if nothing came before it; then come the
states at the chunks' ends, which are a scan again, l/c tokens long, whose steps are the chunks' Σ dt; then what each
token has left of the state before its chunk:

    S_t = inside_t + exp(A Σ_{s ≤ t, same chunk} dt_s) · S_before

Decays are exponentials of A times a sum of dt within one chunk, so every exponent is ≤ 0 whatever dt is, none is a
difference, and small decays next to large ones are not lost.

A block holds its states (l, n, v), channels side by side in memory; from block to block goes one state, and gradients
run a block once more.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mixers.operators.blocks import block_after_block, gradients
from mixers.operators.common import both_directions
from mixers.operators.opaque import opaque

CHUNK = 16
BLOCK_ELEMENTS = 1 << 18  # of the states of a block: they stay in the cache of one core


class _Recurrence(torch.autograd.Function):
    """S_t = gate_t S_{t−1} + addition_t along the second axis; its gradient is the same from the end."""

    @staticmethod
    def forward(ctx, gates, additions, start):  # type: ignore[no-untyped-def]
        states, memory = torch.empty_like(additions), start
        for gate, addition, place in zip(gates.unbind(1), additions.unbind(1), states.unbind(1), strict=True):
            memory = torch.addcmul(addition, gate, memory, out=place)
        ctx.save_for_backward(gates, states, start)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_states):  # type: ignore[no-untyped-def]
        gates, states, start = ctx.saved_tensors
        d_additions = torch.empty_like(states)
        carried = torch.zeros_like(start)
        for gate, d_state, place in zip(*(reversed(t.unbind(1)) for t in (gates, d_states, d_additions)), strict=True):
            torch.add(d_state, carried, out=place)
            carried = gate * place
        return d_additions * _moved(start, states), d_additions, carried


class _WeightedMean(torch.autograd.Function):
    """mean_j exp(dt_j A) dt_j u_j B_jᵀ, (b, h, n, v), block by block in the same way; A is (h, n, v)."""

    @staticmethod
    def forward(ctx, dt, A, B, u):  # type: ignore[no-untyped-def]
        total = u.new_zeros(u.shape[0], *A.shape)
        length, tokens = u.shape[1], _tokens(total)
        ctx.places = [slice(start, start + tokens) for start in range(0, length, tokens)]
        for place in ctx.places:
            total += _weigh_block(dt[:, place], A, B[:, place], u[:, place])
        ctx.save_for_backward(dt, A, B, u)
        return total / length

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_mean):  # type: ignore[no-untyped-def]
        dt, A, B, u = ctx.saved_tensors
        d_dt, d_B, d_u = (torch.empty_like(t) for t in (dt, B, u))
        d_A, d_total = torch.zeros_like(A), d_mean / u.shape[1]
        for place in ctx.places:
            block = (dt[:, place], A, B[:, place], u[:, place])
            d_dt[:, place], rate, d_B[:, place], d_u[:, place] = gradients(_weigh_block, block, (d_total,))
            d_A += rate
        return d_dt, d_A, d_B, d_u


def _causal(
    dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor, memory: Tensor, diagonal: bool = True
) -> tuple[Tensor, Tensor]:
    step, tokens = partial(_scan_block, diagonal=diagonal), _tokens(memory)
    A, memory = A.mT.contiguous(), memory.mT.contiguous()  # channels side by side
    y, memory = block_after_block(step, tokens, (dt, B, C, u), memory, (A,))
    return y, memory.mT


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
    memory = memory + _WeightedMean.apply(dt, A.mT.contiguous(), B, u).mT
    return torch.einsum("blhn,bhvn->blhv", C, memory), memory


_weighted_means = opaque("selective_scan_noncausal", _noncausal)


def noncausal(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
    """Means over all tokens, (b, l, h, v): M = mean_j exp(dt_j A) dt_j u_j B_jᵀ, y_i = M C_i."""
    return _weighted_means(dt, A, B, C, u, u.new_zeros(u.shape[0], *A.shape))[0]


def _scan_block(
    dt: Tensor, B: Tensor, C: Tensor, u: Tensor, memory: Tensor, A: Tensor, diagonal: bool
) -> tuple[Tensor, Tensor]:
    """The tokens of one block, (b, l, h, v), and the memory after it, (b, h, n, v); A is (h, n, v)."""
    gates, additions = _gates_and_additions(dt, A, B, u)
    states = _states(gates, additions, dt[..., None, :], A, memory)
    seen = states if diagonal else gates * _moved(memory, states)  # its own addition taken off again would cancel
    return (C[..., None, :] @ seen)[..., 0, :], states[:, -1]


def _states(gates: Tensor, additions: Tensor, dt: Tensor, A: Tensor, memory: Tensor) -> Tensor:
    """S_t of every token, (b, l, …), from the state before the first, (b, …); dt and A broadcast to the gates' log."""
    length = additions.shape[1]
    if length <= CHUNK:
        return _Recurrence.apply(gates, additions, memory)  # type: ignore[no-any-return]
    gates, additions, dt = (_chunks(t, one) for t, one in ((gates, 1.0), (additions, 0.0), (dt, 0.0)))
    batch = gates.shape[:2]
    inside = _Recurrence.apply(*(t.flatten(0, 1) for t in (gates, additions, torch.zeros_like(gates[:, :, 0]))))
    inside, left = inside.unflatten(0, batch), _decay(dt.cumsum(2), A)
    ends = _states(left[:, :, -1], inside[:, :, -1], dt.sum(2), A, memory)
    return torch.addcmul(inside, left, _moved(memory, ends)[:, :, None]).flatten(1, 2)[:, :length]


def _chunks(x: Tensor, fill: float) -> Tensor:
    """(b, l, h, n, v) -> (b, l / c, c, h, n, v); what fills the last chunk adds nothing and decays nothing."""
    missing = -x.shape[1] % CHUNK
    x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing), value=fill) if missing else x
    return x.unflatten(1, (-1, CHUNK))


def _moved(first: Tensor, states: Tensor) -> Tensor:
    """The state before each token."""
    return torch.cat([first[:, None], states[:, :-1]], dim=1)


def _gates_and_additions(dt: Tensor, A: Tensor, B: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """exp(dt_t A) and dt_t u_t B_tᵀ, (b, l, h, n, v)."""
    return _decay(dt[..., None, :], A), (dt * u)[..., None, :] * B[..., None]


def _decay(dt: Tensor, A: Tensor) -> Tensor:
    """exp(dt A) as a power of two, which torch computes itself: with MKL's exp it takes three times as long."""
    return (dt * (A * math.log2(math.e))).exp2_()


def _weigh_block(dt: Tensor, A: Tensor, B: Tensor, u: Tensor) -> Tensor:
    """Σ_j exp(dt_j A) dt_j u_j B_jᵀ over the tokens of one block, (b, h, n, v); A is (h, n, v)."""
    gates, additions = _gates_and_additions(dt, A, B, u)
    return (gates * additions).sum(1)


def _tokens(memory: Tensor) -> int:
    """Tokens of a block, whole chunks, whose states have about BLOCK_ELEMENTS elements."""
    return CHUNK * max(1, BLOCK_ELEMENTS // CHUNK // max(1, memory.numel()))
