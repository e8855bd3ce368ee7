"""Matrix products over blocks of tokens, exact for any decay: what a CPU runs.

On a CPU each block goes from the feature map to the division while it is in the cache. On a GPU and in a compiled
graph, all tokens are computed at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.function_transforms import needs_plain_operations
from mixers.operators.backend import register_backend
from mixers.operators.directions import sum_both_directions
from mixers.operators.linear import noncausal_blocks, ordered_blocks
from mixers.operators.linear.backend import LinearAttentionBackend, LinearAttentionCall, empty_memory
from mixers.operators.linear.chunks import sum_with_decay, sum_without_decay


@register_backend("chunked")
class ChunkedLinearAttention(LinearAttentionBackend):
    """Chunks of tokens in matrix products, with one state between them; computes every call."""

    def run(self, call: LinearAttentionCall) -> tuple[Tensor, Tensor | None]:
        """Return the result (b, l, h, v) in v's dtype, and the final memory of a causal call.

        O(l·k·v) time, with an order O(l·(c + k)·v). Besides q, k, v and the result it needs memory for one block, and
        with an order for one state per block; the backward pass likewise, besides the gradients.
        """
        if not _suits_blocks(call):
            return super().run(call)
        if not call.has_order:
            return noncausal_blocks.attend(call), None
        if call.causality == "causal":
            return ordered_blocks.attend_causally(call)
        return ordered_blocks.attend_in_both_directions(call), None

    def causal(
        self, q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return decayed sums over tokens 0 … i and over the memory, (b, l, h, v), and the final memory."""
        if log_decay is None:
            return sum_without_decay(q, k, v, memory)
        return sum_with_decay(q, k, log_decay, v, memory)

    def bidirectional(self, q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor) -> Tensor:
        """Return sums over all tokens, decayed in both directions, (b, l, h, v); without decay, two products."""
        if log_decay is None:
            return self.noncausal(q, k, v) * q.shape[1]
        memory = empty_memory(k, v)
        return sum_both_directions(
            lambda q, k, g, v, diagonal: sum_with_decay(q, k, g, v, memory, diagonal=diagonal)[0], q, k, log_decay, v
        )

    def noncausal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return means over all tokens, (b, l, h, v): M = mean_j k_j v_jᵀ, y_i = q_i M.

        Keys are divided before the sum, so that millions of them stay finite.
        """
        memory = torch.einsum("blhk,blhv->bhkv", k / k.shape[1], v)
        return torch.einsum("blhk,bhkv->blhv", q, memory)


def _suits_blocks(call: LinearAttentionCall) -> bool:
    """Whether blocks pay off: a GPU wants all tokens at once, and a compiler would unroll the loop over blocks."""
    return call.device.type == "cpu" and not torch.compiler.is_compiling() and not needs_plain_operations()
