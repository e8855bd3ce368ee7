"""Token shift: what the projections see is x, moved towards the token before it by as much as x says."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenShift(nn.Module):
    """RWKV-6's data-dependent linear interpolation, "ddlerp" (2404.05892 §4.2): (b, l, d) -> one (b, l, d) a stream.

        y_s = x + δ ⊙ (μ_s + up_s tanh(down_s (x + δ ⊙ μ))),    δ_i = x_{i−1} − x_i, x_{−1} = 0

    A token sees itself and the token before it in the order of the scan, whatever the causality of the mixer.
    2·streams·rank·d multiply-adds a token.

    Parameters, as published but for the layout: `mu` (d,), time_maa_x; `offsets` (streams, d), time_maa_w and its
    like; `down.weight` (streams·rank, d), time_maa_w1, zeros at first; `up` (streams, rank, d), time_maa_w2.

    Args:
        streams: how many; the μ of all start alike, from near 1 in the first channel to near 0 in the last.
        rank: of down and up, for each stream.
        depth: of the layer in its network, 0 at the input to 1 at the output: μ starts at 1 − (i/d)^(1 − depth).
    """

    def __init__(self, dim: int, streams: int = 5, rank: int = 32, depth: float = 0.5) -> None:
        super().__init__()
        if streams < 1 or rank < 1:
            raise ValueError(f"Expected at least one stream and rank ≥ 1, got {streams} and {rank}.")
        start = 1 - (torch.arange(dim) / dim) ** (1 - depth)
        self.streams = streams
        self.mu = nn.Parameter(start)
        self.offsets = nn.Parameter(start.repeat(streams, 1))
        self.down = nn.Linear(dim, streams * rank, bias=False)
        self.up = nn.Parameter(torch.empty(streams, rank, dim).uniform_(-0.01, 0.01))
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(b, l, d) -> (b, l, d) for each stream."""
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        delta = before - x
        low = self.down(x + delta * self.mu).tanh().unflatten(-1, (self.streams, -1))
        amounts = self.offsets + torch.einsum("blsr,srd->blsd", low, self.up)
        return (x[:, :, None] + delta[:, :, None] * amounts).unbind(2)

    def flops(self, length: int) -> int:
        """Multiply-adds × 2 of one forward over `length` tokens; elementwise work is not counted."""
        return 4 * length * self.up.numel()
