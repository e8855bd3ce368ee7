"""Ordered passes by flash-linear-attention (fla-org/flash-linear-attention).

simple_gla computes passes without decay or with one gate per head, gla those with one gate per channel. Normalized
results are divided by the kernel's own output for a channel of ones.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mixers.operators.backend import register_backend
from mixers.operators.directions import delay_one_token, sum_both_directions
from mixers.operators.external import first_derivatives_only, refuses_tensors, split_batch
from mixers.operators.linear.backend import LinearAttentionBackend, LinearAttentionCall, empty_memory

WIDEST_HEAD = 256


@register_backend("fla")
class FlaLinearAttention(LinearAttentionBackend):
    """fla's chunk_simple_gla and chunk_gla."""

    package = "fla"
    takes_half_precision = True

    def refuses(self, call: LinearAttentionCall) -> str | None:
        """Return why fla cannot compute a call, or None if it can."""
        if not call.has_order:
            return "there is no order to scan over; triton has a kernel for that"
        return refuses_tensors(call, WIDEST_HEAD - int(call.normalize))

    def causal(
        self, q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return decayed sums over tokens 0 … i and over the memory, (b, l, h, v), and the float32 final memory."""
        width = v.shape[-1]
        padding = -width % 8  # so that rows start where a vector load may
        v = F.pad(v, (0, padding))
        streams = first_derivatives_only(q, k, log_decay, v)
        (memory,) = first_derivatives_only(F.pad(memory.float(), (0, padding)))
        y, memory = split_batch(_run_kernel, tuple(streams), memory)
        return y[..., :width], memory[..., :width]

    def bidirectional(self, q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor) -> Tensor:
        """Return sums over all tokens, decayed in both directions, (b, l, h, v)."""
        memory = empty_memory(k, v)

        def one_direction(q: Tensor, k: Tensor, g: Tensor, v: Tensor, diagonal: bool) -> Tensor:
            if not diagonal:
                q = (q * g.exp()).to(q.dtype)
                k, g, v = (delay_one_token(t) for t in (k, g, v))
            return self.causal(q, k, g, v, memory)[0]

        assert log_decay is not None
        return sum_both_directions(one_direction, q, k, log_decay, v)


def _run_kernel(q: Tensor, k: Tensor, g: Tensor | None, v: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    settings = {"scale": 1.0, "initial_state": memory, "output_final_state": True}
    if g is None or g.shape[-1] == 1:
        y, memory = chunk_simple_gla(q, k, v, None if g is None else g[..., 0].float().contiguous(), **settings)
    else:
        y, memory = chunk_gla(q, k, v, g.float().contiguous(), **settings)
    return y, memory
