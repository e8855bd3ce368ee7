"""The delta rule by flash-linear-attention (fla-org/flash-linear-attention): gated_delta_rule, with gates of 1 if there
is no decay."""

from __future__ import annotations

from torch import Tensor

from mixers.operators.backend import register_backend
from mixers.operators.delta.backend import DeltaRuleBackend, DeltaRuleCall, empty_memory
from mixers.operators.directions import delay_one_token, sum_both_directions
from mixers.operators.external import refuses_tensors, split_batch

WIDEST_HEAD = 256


@register_backend("fla")
class FlaDeltaRule(DeltaRuleBackend):
    """fla's chunk_gated_delta_rule."""

    package = "fla"
    takes_half_precision = True

    def refuses(self, call: DeltaRuleCall) -> str | None:
        """Return why fla cannot compute a call, or None if it can."""
        return refuses_tensors(call, WIDEST_HEAD)

    def causal(
        self, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what tokens read of tokens 0 … i and the memory, (b, l, h, v), and the float32 final memory."""
        return split_batch(_run_kernel, (q, k, beta, log_decay, v), memory.float())

    def bidirectional(self, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor) -> Tensor:
        """Return what tokens read in both directions, (b, l, h, v)."""
        memory = empty_memory(k, v)

        def one_direction(q: Tensor, k: Tensor, beta: Tensor, g: Tensor, v: Tensor, diagonal: bool) -> Tensor:
            if not diagonal:  # the query of the memory that the token decayed and erased: a (I − β k kᵀ) q
                erased = q - (beta * (q * k).sum(-1))[..., None] * k
                q = (g.exp()[..., None] * erased).to(q.dtype)
                k, beta, g, v = (delay_one_token(t) for t in (k, beta, g, v))
            return self.causal(q, k, beta, g, v, memory)[0]

        return sum_both_directions(one_direction, q, k, beta, log_decay, v)


def _run_kernel(q: Tensor, k: Tensor, beta: Tensor, g: Tensor, v: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v, g, beta = (t.contiguous() for t in (q, k, v, g.float(), beta))
    y, memory = chunk_gated_delta_rule(
        q, k, v, g=g, beta=beta, scale=1.0, initial_state=memory, output_final_state=True
    )
    return y, memory
