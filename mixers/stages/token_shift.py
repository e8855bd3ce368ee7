"""Token shift: data-dependent interpolation of each token with the previous one."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenShift(nn.Module):
    """RWKV-6's data-dependent linear interpolation, "ddlerp" (2404.05892 §4.2): (b, l, d) -> one (b, l, d) per stream.

        y_s = x + δ ⊙ (μ_s + up_s tanh(down_s (x + δ ⊙ μ))),    δ_i = x_{i−1} − x_i, x_{−1} = 0

    A token sees itself and the previous token in scan order, whatever the causality of the mixer. Costs
    2·streams·rank·d multiply-adds per token.

    Parameters, as published except for the layout: `mu` (d,), time_maa_x; `offsets` (streams, d), time_maa_w and its
    siblings; `down.weight` (streams·rank, d), time_maa_w1, initially zero; `up` (streams, rank, d), time_maa_w2.

    Args:
        mu: initial μ (d,).
        offsets: initial μ_s of each stream, (streams, d).
        rank: width of down and up, per stream.

    Raises:
        ValueError: There are no streams, or rank < 1.
    """

    def __init__(self, mu: Tensor, offsets: Tensor, rank: int = 32) -> None:
        super().__init__()
        streams, dim = offsets.shape
        if streams < 1 or rank < 1:
            raise ValueError(f"TokenShift: expected at least one stream and rank ≥ 1, got {streams} and {rank}.")
        self.streams = streams
        self.mu = nn.Parameter(mu)
        self.offsets = nn.Parameter(offsets)
        self.down = nn.Linear(dim, streams * rank, bias=False)
        self.up = nn.Parameter(torch.empty(streams, rank, dim).uniform_(-0.01, 0.01))
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map (b, l, d) to (b, l, d) for each stream."""
        previous = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        delta = previous - x
        low_rank = self.down(x + delta * self.mu).tanh().unflatten(-1, (self.streams, -1))
        weights = self.offsets + torch.einsum("blsr,srd->blsd", low_rank, self.up)
        return (x[:, :, None] + delta[:, :, None] * weights).unbind(2)

    def flops(self, length: int) -> int:
        """Return the floating-point operations of a forward over `length` tokens; elementwise work is not counted."""
        return 4 * length * self.up.numel()
