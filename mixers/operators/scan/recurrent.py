"""The second truth: token by token, S ← exp(dt A) S + dt u Bᵀ, y = S C. O(l) steps, each O(v·n)."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.operators.common import both_directions


def causal(
    dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor, memory: Tensor, diagonal: bool = True
) -> tuple[Tensor, Tensor]:
    """Decayed sums over tokens 0 … i and over the memory, (b, l, h, v), and the memory after the last (b, h, v, n).

    Without the diagonal a token reads the memory after it decayed it, and before it adds to it.
    """
    rows = []
    for i in range(u.shape[1]):
        kept = (dt[:, i, :, :, None] * A).exp() * memory
        memory = kept + _addition(dt[:, i], B[:, i], u[:, i])
        rows.append(_read(C[:, i], memory if diagonal else kept))
    return torch.stack(rows, dim=1), memory


def bidirectional(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
    """Sums over all tokens, decayed in both directions, (b, l, h, v)."""
    memory = u.new_zeros(u.shape[0], *A.shape)
    return both_directions(
        lambda dt, B, C, u, diagonal: causal(dt, A, B, C, u, memory, diagonal)[0],
        *(dt, B, C, u),
    )


def noncausal(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
    """Means over all tokens, (b, l, h, v): the memory after the last token, read by every token."""
    memory = u.new_zeros(u.shape[0], *A.shape)
    for i in range(u.shape[1]):
        memory = memory + (dt[:, i, :, :, None] * A).exp() * _addition(dt[:, i], B[:, i], u[:, i])
    return torch.stack([_read(row, memory) for row in C.unbind(1)], dim=1) / u.shape[1]


def _addition(dt: Tensor, B: Tensor, u: Tensor) -> Tensor:
    """What one token adds to the memory: (b, h, v), (b, h, n), (b, h, v) -> (b, h, v, n)."""
    return (dt * u)[..., None] * B[:, :, None]


def _read(C: Tensor, memory: Tensor) -> Tensor:
    """(b, h, n), (b, h, v, n) -> (b, h, v)."""
    return torch.einsum("bhn,bhvn->bhv", C, memory)
