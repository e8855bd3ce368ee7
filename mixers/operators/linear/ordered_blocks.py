"""Passes with an order on a CPU: one block of tokens after another, from the feature map to the division.

A block stays in the cache of a core throughout. Only q, k, v and the result exist as a whole, neither features nor a
channel of ones. In two directions the sums of the forward pass also exist as a whole; the reverse pass, from the last
block on, completes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixers.feature_maps import FEATURE_MAPS
from mixers.normalization import append_ones, count_visible_tokens, divide_by_last
from mixers.operators.blockwise import scan_blocks
from mixers.operators.linear.backend import LinearAttentionCall
from mixers.operators.linear.chunks import block_length, mix_chunks


def attend_causally(call: LinearAttentionCall) -> tuple[Tensor, Tensor]:
    """Return the result (b, l, h, v) in v's dtype, and the memory after the last token. O(l·(c + k)·v) time."""
    start = call.initial_state.memory.to(call.dtype) if call.initial_state else _empty_memory(call)
    tokens = block_length(call.q, call.v, int(call.normalize))
    return scan_blocks(_BlockSteps.of(call).forward, tokens, _streams(call), start)


def attend_in_both_directions(call: LinearAttentionCall) -> Tensor:
    """Return the result (b, l, h, v) in v's dtype, for a call with decay.

    It takes twice the time of a causal pass, and memory for the sums of one direction.
    """
    steps = _BlockSteps.of(call)
    start = _empty_memory(call)
    tokens = block_length(call.q, call.v, int(call.normalize))
    q, k, per_token, v = _streams(call)
    sums, _ = scan_blocks(steps.sums, tokens, (q, k, per_token, v), start, width=start.shape[-1], dtype=call.dtype)
    y, _ = scan_blocks(steps.reverse, tokens, (q, k, per_token, sums, v), start, backwards=True)
    return y


def _streams(call: LinearAttentionCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, the log decays or, without decay, how many tokens each token sees, and v."""
    per_token = call.log_decay
    if per_token is None:
        counts = count_visible_tokens(call.q[:1, :, :1, :1].to(call.dtype), call.causality, call.past)
        per_token = counts[None, :, None, None]
    return call.q, call.k, per_token, call.v


def _empty_memory(call: LinearAttentionCall) -> Tensor:
    """Return the memory before the first token, (b, h, k, v), with a channel of v for the row sums if normalized."""
    shape = (call.v.shape[0], call.v.shape[2], call.k.shape[-1], call.v.shape[-1] + int(call.normalize))
    return call.k.new_zeros(shape, dtype=call.dtype)


@dataclass(frozen=True)
class _BlockSteps:
    """The computations on a block, for one call; it holds none of the call's tensors."""

    feature_map: str
    dtype: torch.dtype
    decays: bool
    normalize: bool
    eps: float
    scale: float

    @classmethod
    def of(cls, call: LinearAttentionCall) -> _BlockSteps:
        return cls(call.feature_map, call.dtype, call.log_decay is not None, call.normalize, call.eps, call.scale)

    def forward(self, q: Tensor, k: Tensor, per_token: Tensor, v: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return the result of a block, and the memory after it; `per_token` is that of `_streams`."""
        sums, memory = self.sums(q, k, per_token, v, memory)
        return self._finish(sums, per_token).to(v.dtype), memory

    def reverse(
        self, q: Tensor, k: Tensor, per_token: Tensor, forward_sums: Tensor, v: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the result from the sums of the forward pass; the memory is that of the tokens after the block."""
        q, k, v = q.flip(1), k.flip(1), v.flip(1)
        sums, memory = self.sums(q, k, per_token.flip(1), v, memory, diagonal=False)
        return self._finish(forward_sums + sums.flip(1), per_token).to(v.dtype), memory

    def sums(
        self, q: Tensor, k: Tensor, per_token: Tensor, v: Tensor, memory: Tensor, diagonal: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return decayed sums of the values and, if normalized, of the weights, (b, l, h, v [+ 1]), and the memory."""
        apply = FEATURE_MAPS[self.feature_map].apply
        q = apply(q.to(self.dtype))
        k = apply(k.to(self.dtype))
        v = v.to(self.dtype)
        v = append_ones(v) if self.normalize else v
        log_decay = per_token.to(self.dtype) if self.decays else None
        return mix_chunks(q, k, log_decay, v, memory, diagonal)

    def _finish(self, sums: Tensor, per_token: Tensor) -> Tensor:
        """Normalize or scale; eps on the mean visible weight is eps times the number of visible tokens on the sum."""
        if not self.normalize:
            return sums * self.scale
        return divide_by_last(sums, self.eps if self.decays else self.eps * per_token)
