"""Where there is an order, on a CPU: block after block, each from the feature map to the division in the cache.

The sums of a block are those of `chunked`. As a whole there are q, k, v and the result alone, no features and no column
of ones; with two directions also the sums of the first, which the second, from the last block on, completes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixers.feature_maps import FEATURE_MAPS
from mixers.normalization import append_ones, count_visible_tokens, divide_by_last
from mixers.operators.blocks import block_after_block
from mixers.operators.common import one_of_equals
from mixers.operators.linear import blocked, chunked
from mixers.operators.linear.call import Backend, Call


def causal(call: Call) -> tuple[Tensor, Tensor | None]:
    """The result (b, l, h, v) in v's dtype, and the memory after the last token. First derivatives only.

    O(l·(c + k)·v) time. Memory besides q, k, v and the result: what a block needs, and a state a block; backward too,
    besides the gradients. On a GPU and in a compiled graph it is `chunked`, all tokens at once.
    """
    if not blocked.by_blocks(call):
        return Backend(chunked).attend(call)
    start = call.initial_state.memory if call.initial_state else _no_tokens(call)
    return block_after_block(_Steps.of(call).ahead, _tokens(call), _streams(call), start)


def bidirectional(call: Call) -> tuple[Tensor, None]:
    """The result (b, l, h, v) in v's dtype, of both directions; without decay there is no order.

    Twice the time of `causal`, and the sums of one direction in memory.
    """
    if call.log_decay is None:
        return blocked.unordered(call)
    if not blocked.by_blocks(call):
        return Backend(chunked).attend(call)[0], None
    steps, streams, start = _Steps.of(call), _streams(call), _no_tokens(call)
    summed, _ = block_after_block(steps.sums, _tokens(call), streams, start, width=start.shape[-1], dtype=call.dtype)
    *before, v = streams
    return block_after_block(steps.back, _tokens(call), (*before, summed, v), start, backwards=True)[0], None


def _tokens(call: Call) -> int:
    return chunked.tokens_a_block(call.q, call.v)


def _streams(call: Call) -> tuple[Tensor, ...]:
    """What goes by blocks: q, k, the log decays or, where there are none, how many tokens each token sees, and v."""
    counts = count_visible_tokens(call.q[:1, :, :1, :1].to(call.dtype), call.causality, call.seen)[None, :, None, None]
    return (*map(one_of_equals, (call.q, call.k)), counts if call.log_decay is None else call.log_decay, call.v)


def _no_tokens(call: Call) -> Tensor:
    """The memory before the first token, (b, h, k, v), with the sum of the weights as one more column of v."""
    shape = (call.k.shape[0], *call.k.shape[2:], call.v.shape[-1] + int(call.normalize))
    return call.k.new_zeros(shape, dtype=call.dtype)


@dataclass(frozen=True)
class _Steps:
    """What is done with a block, for one call; it keeps none of the call's tensors."""

    feature_map: str
    dtype: torch.dtype
    decays: bool
    normalize: bool
    eps: float
    scale: float

    @classmethod
    def of(cls, call: Call) -> _Steps:
        return cls(call.feature_map, call.dtype, call.log_decay is not None, call.normalize, call.eps, call.scale)

    def ahead(self, q: Tensor, k: Tensor, told: Tensor, v: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The result of a block, and the memory after it; `told` is what `_streams` tells of each token."""
        sums, memory = self.sums(q, k, told, v, memory)
        return self._result(sums, told).to(v.dtype), memory

    def back(
        self, q: Tensor, k: Tensor, told: Tensor, summed: Tensor, v: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The result from the sums ahead; the memory is that of the tokens after the block."""
        q, k, gates, v_back = (t.flip(1) for t in (q, k, told, v))
        sums, memory = self.sums(q, k, gates, v_back, memory, diagonal=False)
        return self._result(summed + sums.flip(1), told).to(v.dtype), memory

    def sums(
        self, q: Tensor, k: Tensor, told: Tensor, v: Tensor, memory: Tensor, diagonal: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Decayed sums of the values and, normalized, of the weights: (b, l, h, v [+ 1]); and the memory after them."""
        apply = FEATURE_MAPS[self.feature_map].apply
        q, k, v, told = apply(q.to(self.dtype)), apply(k.to(self.dtype)), v.to(self.dtype), told.to(self.dtype)
        v = append_ones(v) if self.normalize else v
        return chunked.block(q, k, told if self.decays else None, v, memory, diagonal)

    def _result(self, sums: Tensor, told: Tensor) -> Tensor:
        """eps is on the mean visible weight: on the sum it is eps times the number of visible tokens."""
        if not self.normalize:
            return sums * self.scale
        return divide_by_last(sums, self.eps) if self.decays else divide_by_last(sums, self.eps * told)
