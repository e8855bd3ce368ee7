"""The second reference: token by token, S ← exp(dt A) S + dt u Bᵀ, y = S C. O(l) steps of O(v·n)."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.operators.backend import register_backend
from mixers.operators.directions import sum_both_directions
from mixers.operators.scan.backend import SelectiveScanBackend


@register_backend("recurrent")
class RecurrentSelectiveScan(SelectiveScanBackend):
    """The recurrence, one token at a time."""

    def causal(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return decayed sums over tokens 0 … i and the memory, (b, l, h, v), and the final memory (b, h, v, n)."""
        return recur(dt, A, B, C, u, memory)

    def bidirectional(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
        """Return sums over all tokens, decayed in both directions, (b, l, h, v)."""
        memory = u.new_zeros(u.shape[0], *A.shape)
        return sum_both_directions(
            lambda dt, B, C, u, diagonal: recur(dt, A, B, C, u, memory, diagonal)[0], dt, B, C, u
        )

    def noncausal(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
        """Return means over all tokens, (b, l, h, v): every token reads the memory after the last one."""
        memory = u.new_zeros(u.shape[0], *A.shape)
        for i in range(u.shape[1]):
            memory = memory + (dt[:, i, :, :, None] * A).exp() * _addition(dt[:, i], B[:, i], u[:, i])
        return torch.stack([_read(row, memory) for row in C.unbind(1)], dim=1) / u.shape[1]


def recur(
    dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor, memory: Tensor, diagonal: bool = True
) -> tuple[Tensor, Tensor]:
    """Run the recurrence from a memory; returns what the tokens read, (b, l, h, v), and the final memory.

    With diagonal=False a token reads the memory after decaying it and before adding to it.
    """
    rows = []
    for i in range(u.shape[1]):
        decayed = (dt[:, i, :, :, None] * A).exp() * memory
        memory = decayed + _addition(dt[:, i], B[:, i], u[:, i])
        rows.append(_read(C[:, i], memory if diagonal else decayed))
    return torch.stack(rows, dim=1), memory


def _addition(dt: Tensor, B: Tensor, u: Tensor) -> Tensor:
    """Return what one token adds to the memory: (b, h, v), (b, h, n), (b, h, v) -> (b, h, v, n)."""
    return (dt * u)[..., None] * B[:, :, None]


def _read(C: Tensor, memory: Tensor) -> Tensor:
    """(b, h, n), (b, h, v, n) -> (b, h, v)."""
    return torch.einsum("bhn,bhvn->bhv", C, memory)
