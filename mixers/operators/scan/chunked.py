"""The scan in blocks of tokens: the states S_t = exp(dt_t A) S_{t−1} + dt_t u_t B_tᵀ of a block at a time.

A block of more than c tokens is split into chunks of c, computed side by side, each as if nothing came before it. Then
come the states at the chunks' ends, which are a scan again, l/c tokens long, whose steps are the chunks' Σ dt; and last
what each token still has of the state before its chunk:

    S_t = inside_t + exp(A Σ_{s ≤ t, same chunk} dt_s) · S_before

Decays are exponentials of A times a sum of dt within one chunk, so every exponent is ≤ 0 whatever dt is, none is a
difference, and small decays next to large ones are not lost.

A block holds its states (l, n, v), channels side by side in memory; one state goes from block to block, and gradients
run a block once more.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mixers.function_transforms import needs_plain_operations
from mixers.operators import blockwise
from mixers.operators.backend import register_backend
from mixers.operators.blockwise import scan_blocks
from mixers.operators.compilation import as_graph_node
from mixers.operators.differentiation import differentiable_gradients, recomputed_gradients
from mixers.operators.directions import sum_both_directions
from mixers.operators.scan.backend import SelectiveScanBackend
from mixers.precision import no_autocast

CHUNK = 16


@register_backend("chunked")
class ChunkedSelectiveScan(SelectiveScanBackend):
    """Blocks of tokens, with one state between them; computes every call."""

    def causal(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return decayed sums over tokens 0 … i and the memory, (b, l, h, v), and the final memory (b, h, v, n)."""
        return scan(dt, A, B, C, u, memory)

    def bidirectional(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
        """Return sums over all tokens, decayed in both directions, (b, l, h, v)."""
        memory = u.new_zeros(u.shape[0], *A.shape)
        return sum_both_directions(
            lambda dt, B, C, u, diagonal: scan(dt, A, B, C, u, memory, diagonal=diagonal)[0], dt, B, C, u
        )

    def noncausal(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
        """Return means over all tokens, (b, l, h, v): M = mean_j exp(dt_j A) dt_j u_j B_jᵀ, y_i = M C_i."""
        return _read_mean(dt, A, B, C, u, u.new_zeros(u.shape[0], *A.shape))[0]


def _scan(
    dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor, memory: Tensor, diagonal: bool = True
) -> tuple[Tensor, Tensor]:
    step = partial(_scan_block, diagonal=diagonal)
    tokens = _block_length(memory)
    A, memory = A.mT.contiguous(), memory.mT.contiguous()  # channels side by side
    y, memory = scan_blocks(step, tokens, (dt, B, C, u), memory, (A,))
    return y, memory.mT


scan = as_graph_node("selective_scan_chunked", _scan)
"""(dt: (b, l, h, v), A: (h, v, n), B, C: (b, l, h, n), u: (b, l, h, v), memory: (b, h, v, n), diagonal) -> decayed sums
over tokens 0 … i and over the memory, and the final memory. O(l·v·n) time; memory O(l·(v + n)), and the states of one
block; the backward pass likewise, besides one state per block. With diagonal=False a token does not see itself.
"""


def _read_weighted_mean(
    dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor, memory: Tensor, diagonal: bool = True
) -> tuple[Tensor, Tensor]:
    A = A.mT.contiguous()
    mean = _mean_plainly(dt, A, B, u) if needs_plain_operations() else _WeightedMean.apply(dt, A, B, u)
    memory = memory + mean.mT
    return torch.einsum("blhn,bhvn->blhv", C, memory), memory


_read_mean = as_graph_node("selective_scan_noncausal", _read_weighted_mean)


class _Recurrence(torch.autograd.Function):
    """S_t = gate_t S_{t−1} + addition_t along the second axis; its gradient is the same recurrence from the end."""

    @staticmethod
    def forward(ctx, gates, additions, start):  # type: ignore[no-untyped-def]
        states = torch.empty_like(additions)
        memory = start
        for gate, addition, out in zip(gates.unbind(1), additions.unbind(1), states.unbind(1), strict=True):
            memory = torch.addcmul(addition, gate, memory, out=out)
        ctx.save_for_backward(gates, states, start)
        return states

    @staticmethod
    def backward(ctx, d_states):  # type: ignore[no-untyped-def]
        gates, states, start = ctx.saved_tensors
        with no_autocast(d_states):
            if torch.is_grad_enabled():  # create_graph=True: in terms of the recurrence itself
                following = torch.cat([gates[:, 1:], torch.zeros_like(gates[:, :1])], dim=1)
                d_additions = recur(following.flip(1), d_states.flip(1), torch.zeros_like(start)).flip(1)
                return d_additions * _previous(start, states), d_additions, gates[:, 0] * d_additions[:, 0]
            d_additions = torch.empty_like(states)
            carried = torch.zeros_like(start)
            reversed_steps = (reversed(t.unbind(1)) for t in (gates, d_states, d_additions))
            for gate, d_state, out in zip(*reversed_steps, strict=True):
                torch.add(d_state, carried, out=out)
                carried = gate * out
            return d_additions * _previous(start, states), d_additions, carried


def recur(gates: Tensor, additions: Tensor, start: Tensor) -> Tensor:
    """Return S_t = gate_t S_{t−1} + addition_t along the second axis, from a start: (b, l, …), (b, l, …), (b, …)."""
    if not needs_plain_operations():
        return _Recurrence.apply(gates, additions, start)  # type: ignore[no-any-return]
    states = []
    for gate, addition in zip(gates.unbind(1), additions.unbind(1), strict=True):
        start = torch.addcmul(addition, gate, start)
        states.append(start)
    return torch.stack(states, dim=1)


class _WeightedMean(torch.autograd.Function):
    """mean_j exp(dt_j A) dt_j u_j B_jᵀ, (b, h, n, v), block by block; A is (h, n, v)."""

    @staticmethod
    def forward(ctx, dt, A, B, u):  # type: ignore[no-untyped-def]
        total = u.new_zeros(u.shape[0], *A.shape)
        length = u.shape[1]
        tokens = _block_length(total)
        ctx.spans = [slice(start, start + tokens) for start in range(0, length, tokens)]
        for span in ctx.spans:
            total += _weigh_block(dt[:, span], A, B[:, span], u[:, span])
        ctx.save_for_backward(dt, A, B, u)
        return total / length

    @staticmethod
    def backward(ctx, d_mean):  # type: ignore[no-untyped-def]
        dt, A, B, u = ctx.saved_tensors
        with no_autocast(d_mean):
            if torch.is_grad_enabled():  # create_graph=True
                return differentiable_gradients(_mean_plainly, (dt, A, B, u), (d_mean,), ctx.needs_input_grad)
            d_dt, d_B, d_u = (torch.empty_like(t) for t in (dt, B, u))
            d_A = torch.zeros_like(A)
            d_total = d_mean / u.shape[1]
            for span in ctx.spans:
                block = (dt[:, span], A, B[:, span], u[:, span])
                d_dt[:, span], block_d_A, d_B[:, span], d_u[:, span] = recomputed_gradients(
                    _weigh_block, block, (d_total,)
                )
                d_A += block_d_A
            return d_dt, d_A, d_B, d_u


def _mean_plainly(dt: Tensor, A: Tensor, B: Tensor, u: Tensor) -> Tensor:
    """Return the same mean by operations that torch can differentiate any number of times."""
    return _weigh_block(dt, A, B, u) / u.shape[1]


def _scan_block(
    dt: Tensor, B: Tensor, C: Tensor, u: Tensor, memory: Tensor, A: Tensor, diagonal: bool
) -> tuple[Tensor, Tensor]:
    """Return the result of one block, (b, l, h, v), and the memory after it, (b, h, n, v); A is (h, n, v)."""
    gates, additions = _gates_and_additions(dt, A, B, u)
    states = _states(gates, additions, dt[..., None, :], A, memory)
    # Without the diagonal: subtracting a token's own addition from its state would cancel.
    visible = states if diagonal else gates * _previous(memory, states)
    return (C[..., None, :] @ visible)[..., 0, :], states[:, -1]


def _states(gates: Tensor, additions: Tensor, dt: Tensor, A: Tensor, memory: Tensor) -> Tensor:
    """Return S_t of every token, (b, l, …), from the memory before the first, (b, …); gates are exp(dt A)."""
    length = additions.shape[1]
    if length <= CHUNK:
        return recur(gates, additions, memory)
    gates, additions, dt = (_split_chunks(t, fill) for t, fill in ((gates, 1.0), (additions, 0.0), (dt, 0.0)))
    batch_and_chunks = gates.shape[:2]
    inside = recur(*(t.flatten(0, 1) for t in (gates, additions, torch.zeros_like(gates[:, :, 0]))))
    inside = inside.unflatten(0, batch_and_chunks)
    remaining = _decay(dt.cumsum(2), A)
    ends = _states(remaining[:, :, -1], inside[:, :, -1], dt.sum(2), A, memory)
    return torch.addcmul(inside, remaining, _previous(memory, ends)[:, :, None]).flatten(1, 2)[:, :length]


def _split_chunks(x: Tensor, fill: float) -> Tensor:
    """(b, l, h, n, v) -> (b, l / c, c, h, n, v); the padding of the last chunk adds nothing and decays nothing."""
    missing = -x.shape[1] % CHUNK
    x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing), value=fill) if missing else x
    return x.unflatten(1, (-1, CHUNK))


def _previous(first: Tensor, states: Tensor) -> Tensor:
    """Return the state before each token."""
    return torch.cat([first[:, None], states[:, :-1]], dim=1)


def _gates_and_additions(dt: Tensor, A: Tensor, B: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(dt_t A) and dt_t u_t B_tᵀ, (b, l, h, n, v)."""
    return _decay(dt[..., None, :], A), (dt * u)[..., None, :] * B[..., None]


def _decay(dt: Tensor, A: Tensor) -> Tensor:
    """Return exp(dt A) as a power of two, which torch computes itself: MKL's exp takes three times as long."""
    return (dt * (A * math.log2(math.e))).exp2_()


def _weigh_block(dt: Tensor, A: Tensor, B: Tensor, u: Tensor) -> Tensor:
    """Return Σ_j exp(dt_j A) dt_j u_j B_jᵀ over the tokens of one block, (b, h, n, v); A is (h, n, v)."""
    gates, additions = _gates_and_additions(dt, A, B, u)
    return (gates * additions).sum(1)


def _block_length(memory: Tensor) -> int:
    """Return the tokens per block, whole chunks, whose states stay in the cache."""
    return CHUNK * max(1, blockwise.BLOCK_ELEMENTS // CHUNK // max(1, memory.numel()))
