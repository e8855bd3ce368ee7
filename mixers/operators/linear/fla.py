"""Causal passes by flash-linear-attention (fla-org/flash-linear-attention): simple_gla without decay or with one gate a
head, gla with one a channel. Normalized by their own output for a column of ones."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mixers.operators.bridge import in_parts, later, refuses_tensors
from mixers.operators.choice import Problem
from mixers.operators.common import both_directions

NARROW = True
LARGEST_HEAD = 256


def refuses(problem: Problem) -> str | None:
    """Why fla cannot compute this, or None."""
    if problem.causality == "noncausal" or (problem.causality == "bidirectional" and problem.decay == "none"):
        return "there is no order to scan over; triton has a kernel for that"
    return refuses_tensors(problem, LARGEST_HEAD - int(problem.normalize))


def causal(q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Decayed sums over tokens 0 … i and over the memory, (b, l, h, v), and the memory after the last, in float32."""
    width = v.shape[-1]
    padded = -width % 8  # rows that start where a vector load may
    y, memory = in_parts(_kernel, (q, k, log_decay, F.pad(v, (0, padded))), F.pad(memory.float(), (0, padded)))
    return y[..., :width], memory[..., :width]


def bidirectional(q: Tensor, k: Tensor, log_decay: Tensor, v: Tensor) -> Tensor:
    """Sums over all tokens, decayed in both directions, (b, l, h, v)."""
    memory = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])

    def one_way(q: Tensor, k: Tensor, g: Tensor, v: Tensor, diagonal: bool) -> Tensor:
        if not diagonal:
            q, k, g, v = (q * g.exp()).to(q.dtype), later(k), later(g), later(v)
        return causal(q, k, g, v, memory)[0]

    return both_directions(one_way, q, k, log_decay, v)


def _kernel(q: Tensor, k: Tensor, g: Tensor | None, v: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    settings = {"scale": 1.0, "initial_state": memory, "output_final_state": True}
    if g is None or g.shape[-1] == 1:
        y, memory = chunk_simple_gla(q, k, v, None if g is None else g[..., 0].float().contiguous(), **settings)
    else:
        y, memory = chunk_gla(q, k, v, g.float().contiguous(), **settings)
    return y, memory
