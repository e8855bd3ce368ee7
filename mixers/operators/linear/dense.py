"""The first reference: build W (b, h, l, l) and multiply. O(l²) time and memory, O(l²·k) with a decay per channel."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.operators.backend import register_backend
from mixers.operators.linear.backend import LinearAttentionBackend


@register_backend("dense")
class DenseLinearAttention(LinearAttentionBackend):
    """The l × l matrix, applied to the values."""

    def causal(
        self, q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return decayed sums over tokens 0 … i and over the memory, (b, l, h, v), and the final memory."""
        sums = torch.einsum("bhij,bjhv->bihv", mixing_matrix(q, k, log_decay, "causal"), v)
        decayed = memory
        if log_decay is not None:
            since_start = log_decay.cumsum(1).exp()
            to_end = segment_sums(log_decay)[..., -1, :].exp().permute(0, 3, 1, 2)
            q = q * since_start
            k = k * to_end
            decayed = since_start[:, -1, :, :, None] * memory
        sums = sums + torch.einsum("blhk,bhkv->blhv", q, memory)
        return sums, decayed + torch.einsum("blhk,blhv->bhkv", k, v)

    def noncausal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return means over all tokens, (b, l, h, v)."""
        return torch.einsum("bhij,bjhv->bihv", mixing_matrix(q, k, None, "noncausal") / k.shape[1], v)

    def bidirectional(self, q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor) -> Tensor:
        """Return sums over all tokens, decayed in both directions, (b, l, h, v)."""
        return torch.einsum("bhij,bjhv->bihv", mixing_matrix(q, k, log_decay, "bidirectional"), v)


def mixing_matrix(q: Tensor, k: Tensor, log_decay: Tensor | None, causality: str) -> Tensor:
    """Return W = (q kᵀ) ⊙ L, (b, h, l, l), by its definition; log_decay is (b, l, h, 1 or k) or None.

    L_ij = ∏_{t=j+1..i} a_t for j ≤ i, ∏_{t=i..j−1} a_t for j > i if bidirectional, 1 without decay.
    """
    if log_decay is None:
        product = torch.einsum("bihk,bjhk->bhij", q, k)
        return product.tril() if causality == "causal" else product
    mask = segment_sums(log_decay).exp().tril()
    if causality == "bidirectional":
        # The sum of the gates t = i … j−1 is that of the gates t = i+1 … j, delayed by one token.
        delayed = torch.cat([log_decay[:, :1], log_decay[:, :-1]], dim=1)
        mask = mask + segment_sums(delayed).exp().tril(-1).transpose(-1, -2)
    if log_decay.shape[-1] == 1:
        return torch.einsum("bihk,bjhk->bhij", q, k) * mask[:, :, 0]
    return torch.einsum("bihk,bjhk,bhkij->bhij", q, k, mask)


def segment_sums(x: Tensor) -> Tensor:
    """Return Σ_{t=j+1..i} x_t for j ≤ i, and 0 for j > i: (b, l, h, k) -> (b, h, k, l, l).

    Each sum is computed by itself: a difference of running sums would lose small terms next to large ones.
    """
    length = x.shape[1]
    steps = x.permute(0, 2, 3, 1)[..., None].expand(*x.shape[:1], *x.shape[2:], length, length)
    return steps.tril(-1).cumsum(-2)
