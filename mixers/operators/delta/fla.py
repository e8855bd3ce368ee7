"""The delta rule by flash-linear-attention (fla-org/flash-linear-attention).

gated_delta_rule computes passes without decay, with gates of 1, and with one gate per head; kda those with one gate per
channel. Normalized results are divided by the kernel's own output for a channel of ones.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mixers.operators.backend import register_backend
from mixers.operators.delta.backend import DeltaRuleBackend, DeltaRuleCall, empty_memory
from mixers.operators.directions import delay_one_token, sum_both_directions
from mixers.operators.external import first_derivatives_only, refuses_tensors, split_batch

WIDEST_HEAD = 256


@register_backend("fla")
class FlaDeltaRule(DeltaRuleBackend):
    """fla's chunk_gated_delta_rule and chunk_kda."""

    package = "fla"
    takes_half_precision = True

    def refuses(self, call: DeltaRuleCall) -> str | None:
        """Return why fla cannot compute a call, or None if it can."""
        if call.causality == "noncausal":
            return "there is no order to scan over"
        return refuses_tensors(call, WIDEST_HEAD - int(call.normalize))

    def causal(
        self, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what tokens read of tokens 0 … i and the memory, (b, l, h, v), and the float32 final memory."""
        width = v.shape[-1]
        padding = -width % 8  # so that rows start where a vector load may
        v = F.pad(v, (0, padding))
        streams = first_derivatives_only(q, k, beta, log_decay, v)
        (memory,) = first_derivatives_only(F.pad(memory.float(), (0, padding)))
        y, memory = split_batch(_run_kernel, tuple(streams), memory)
        return y[..., :width], memory[..., :width]

    def bidirectional(self, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor) -> Tensor:
        """Return what tokens read in both directions, (b, l, h, v)."""
        memory = empty_memory(k, v)

        def one_direction(q: Tensor, k: Tensor, beta: Tensor, g: Tensor, v: Tensor, diagonal: bool) -> Tensor:
            if not diagonal:  # the query of the memory that the token decayed and erased: a (I − β k kᵀ) q
                erased = q - (beta * (q * k).sum(-1))[..., None] * k
                q = (g.exp() * erased).to(q.dtype)
                k, beta, g, v = (delay_one_token(t) for t in (k, beta, g, v))
            return self.causal(q, k, beta, g, v, memory)[0]

        return sum_both_directions(one_direction, q, k, beta, log_decay, v)


def _run_kernel(q: Tensor, k: Tensor, beta: Tensor, g: Tensor, v: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    if g.shape[-1] > 1:
        from fla.ops.kda import chunk_kda as kernel

        gates = g
    else:  # also with versions of fla that have no KDA
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as kernel

        gates = g[..., 0]
    q, k, v, gates, beta = (t.contiguous() for t in (q, k, v, gates.float(), beta))
    y, memory = kernel(q, k, v, g=gates, beta=beta, scale=1.0, initial_state=memory, output_final_state=True)
    return y, memory
