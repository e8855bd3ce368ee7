"""The delta rule by flash-linear-attention (fla-org/flash-linear-attention): gated_delta_rule, with
gates of one where there is no decay."""

from __future__ import annotations

from torch import Tensor

from mixers.operators.bridge import in_parts, later, refuses_tensors
from mixers.operators.choice import Problem
from mixers.operators.common import both_directions

NARROW = True
LARGEST_HEAD = 256


def refuses(problem: Problem) -> str | None:
    """Why fla cannot compute this, or None."""
    return refuses_tensors(problem, LARGEST_HEAD)


def causal(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """What tokens read of tokens 0 … i and of the memory, (b, l, h, v), and the memory after the last, in float32."""
    return in_parts(_kernel, (q, k, beta, log_decay, v), memory.float())


def bidirectional(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor) -> Tensor:
    """What tokens read in both directions, (b, l, h, v)."""
    memory = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])

    def one_way(q: Tensor, k: Tensor, beta: Tensor, g: Tensor, v: Tensor, diagonal: bool) -> Tensor:
        if not diagonal:  # the query of the memory that the token decayed and erased: a (I − β k kᵀ) q
            erased = q - (beta * (q * k).sum(-1))[..., None] * k
            q = (g.exp()[..., None] * erased).to(q.dtype)
            k, beta, g, v = later(k), later(beta), later(g), later(v)
        return causal(q, k, beta, g, v, memory)[0]

    return both_directions(one_way, q, k, beta, log_decay, v)


def _kernel(q: Tensor, k: Tensor, beta: Tensor, g: Tensor, v: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v, g, beta = (t.contiguous() for t in (q, k, v, g.float(), beta))
    y, memory = chunk_gated_delta_rule(
        q, k, v, g=g, beta=beta, scale=1.0, initial_state=memory, output_final_state=True
    )
    return y, memory
