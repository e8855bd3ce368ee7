"""Log decays, ≤ 0: how much of its state a mixer forgets at each token.

All are computed in float32 at least, whatever the parameters' dtype and autocast say: the sums over tokens that follow
would round small decays away, and a half-precision product could overflow. The projections are as small as their
results, so that costs no time worth naming.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers.precision import accumulation_dtype
from mixers.stages.projections import linear_in_full_precision


class FixedDecay(nn.Module):
    """RetNet's: log γ_h with γ_h = 1 − 2^(−5−h) for head h = 0, 1, … (2307.08621 §2.2). No parameters or buffers.

    Args:
        first: 5, the exponent of the first head, whose memory reaches 2^first tokens.
    """

    def __init__(self, heads: int, first: float = 5.0) -> None:
        super().__init__()
        if first <= 0:
            raise ValueError(f"Expected first > 0, so that 0 < γ < 1; got {first}.")
        self.heads, self.first = heads, first

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, d) -> (h,); x tells the device and the dtype alone."""
        exponents = self.first + torch.arange(self.heads, device=x.device, dtype=accumulation_dtype(x))
        return torch.log1p(-torch.exp2(-exponents))


class ScalarDecay(nn.Module):
    """Mamba-2's step and decay, one of each a head (2405.21060); Gated DeltaNet's as well (2412.06464).

    Δ = softplus(to_dt(x) + dt_bias) and log decay = Δ · A with A = −exp(A_log).

    Parameters, as published: `to_dt.weight` (h, d) (the last rows of Mamba-2's in_proj, fla's a_proj), `dt_bias` (h,)
    and `A_log` (h,).

    Args:
        a_range: −A starts uniform in it; Gated DeltaNet starts in (0, 16).
        dt_range: Δ starts log-uniform in it, for x = 0.
        directions: 2 gives each direction a Δ of its own (Hydra, 2407.09941), with `dt_bias` and `A_log` in common:
            `to_dt.weight` (2·h, d) and results (b, l, 2·h), the first direction's heads first.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        a_range: tuple[float, float] = (1.0, 16.0),
        dt_range: tuple[float, float] = (1e-3, 1e-1),
        directions: int = 1,
    ) -> None:
        super().__init__()
        self.directions = directions
        self.to_dt = nn.Linear(dim, directions * heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*a_range).clamp(min=1e-4).log())
        dt = torch.empty(heads).uniform_(math.log(dt_range[0]), math.log(dt_range[1])).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b, l, d) -> Δ ≥ 0 and the log decay, (b, l, h) each."""
        step = linear_in_full_precision(self.to_dt, x)
        dt = F.softplus(step + self.dt_bias.to(step.dtype).repeat(self.directions))
        return dt, -dt * self.A_log.to(step.dtype).exp().repeat(self.directions)


class LowRankDecay(nn.Module):
    """GLA's, one a key channel: logsigmoid(up(down(x))) / normalizer (2312.06635).

    Parameters, as published (fla's gk_proj.0 and gk_proj.1): `down.weight` (rank, d), `up.weight` (channels, rank)
    and `up.bias`. rank·(d + channels) multiply-adds a token.

    Args:
        normalizer: a larger one forgets less.
    """

    def __init__(self, dim: int, channels: int, rank: int = 16, normalizer: float = 16.0) -> None:
        super().__init__()
        if normalizer <= 0:
            raise ValueError(f"Expected normalizer > 0, so that decays are ≤ 0; got {normalizer}.")
        self.normalizer = normalizer
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, channels)."""
        return F.logsigmoid(linear_in_full_precision(self.up, linear_in_full_precision(self.down, x))) / self.normalizer


class DoubleExponentialDecay(nn.Module):
    """RWKV-6's, one a key channel: −exp(w), w = up(tanh(down(x))) (2404.05892).

    w is cut off at 7, where the gate exp(−exp(w)) is 0 even in float64.

    Parameters: `down.weight` (rank, d), zeros at first; `up.weight` (channels, rank); `up.bias` (channels,), the w of
    every token at first: −6 + 5 · (i / (channels − 1))^(0.7 + 1.3 depth) for channel i, from slow to fast, as
    published. rank·(d + channels) multiply-adds a token.

    Args:
        depth: of the layer in its network, 0 at the input to 1 at the output.
    """

    def __init__(self, dim: int, channels: int, rank: int = 64, depth: float = 0.5) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, channels)
        nn.init.zeros_(self.down.weight)
        nn.init.uniform_(self.up.weight, -0.01, 0.01)
        ramp = torch.arange(channels) / max(channels - 1, 1)
        with torch.no_grad():
            self.up.bias.copy_(-6 + 5 * ramp ** (0.7 + 1.3 * depth))

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, channels)."""
        return -linear_in_full_precision(self.up, linear_in_full_precision(self.down, x).tanh()).clamp(max=7).exp()
