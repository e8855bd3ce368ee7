"""Log decays, ≤ 0: how much of its state a mixer keeps at each token.

All are computed in float32 at least, whatever the dtype of the parameters and autocast: the sums over tokens that
follow would lose small decays to rounding, and half-precision products could overflow. The projections are as small as
their results, so this costs no measurable time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers.precision import accumulation_dtype
from mixers.stages.projections import FullPrecisionLinear


def inverse_softplus_of_log_uniform(size: int, low: float, high: float) -> Tensor:
    """Draw biases b (size,) such that softplus(b) is log-uniform in [low, high], as Mamba initializes Δ."""
    dt = torch.empty(size).uniform_(math.log(low), math.log(high)).exp()
    return dt + torch.log(-torch.expm1(-dt))


class FixedDecay(nn.Module):
    """RetNet's decay: log γ_h with γ_h = 1 − 2^(−first−h) for head h = 0, 1, … (2307.08621 §2.2). No parameters.

    Args:
        heads: number of heads.
        first: exponent of the first head, whose memory spans about 2^first tokens.

    Raises:
        ValueError: first ≤ 0.
    """

    def __init__(self, heads: int, first: float = 5.0) -> None:
        super().__init__()
        if first <= 0:
            raise ValueError(f"FixedDecay: expected first > 0, so that 0 < γ < 1; got {first}.")
        self.heads = heads
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        """Return log γ, (h,), in the accumulation dtype and on the device of the tokens x."""
        exponents = self.first + torch.arange(self.heads, device=x.device, dtype=accumulation_dtype(x))
        return torch.log1p(-torch.exp2(-exponents))


class ScalarDecay(nn.Module):
    """Mamba-2's step size and decay, one of each per head (2405.21060); Gated DeltaNet's too (2412.06464).

    Δ = softplus(to_dt(x) + dt_bias), log decay = Δ · A with A = −exp(A_log).

    Parameters, as published: `to_dt.weight` (h, d) (the last rows of Mamba-2's in_proj; fla's a_proj), `dt_bias` (h,)
    and `A_log` (h,).

    Args:
        dim: model width d.
        heads: number of heads h.
        a_range: −A is initialized uniformly in this range.
        dt_range: for x = 0, Δ is initialized log-uniformly in this range.
        directions: 2 gives each direction its own Δ (Hydra, 2407.09941), with `dt_bias` and `A_log` shared:
            `to_dt.weight` is (2·h, d) and results are (b, l, 2·h), the first direction's heads first.
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
        self.to_dt = FullPrecisionLinear(dim, directions * heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*a_range).clamp(min=1e-4).log())
        self.dt_bias = nn.Parameter(inverse_softplus_of_log_uniform(heads, *dt_range))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (b, l, d) to Δ ≥ 0 and the log decay, (b, l, h) each."""
        step = self.to_dt(x)
        dt = F.softplus(step + self.dt_bias.to(step.dtype).repeat(self.directions))
        return dt, -dt * self.A_log.to(step.dtype).exp().repeat(self.directions)


class LowRankDecay(nn.Module):
    """GLA's decay, one per key channel: logsigmoid(up(down(x))) / normalizer (2312.06635).

    Parameters, as published (fla's gk_proj.0 and gk_proj.1): `down.weight` (rank, d), `up.weight` (channels, rank)
    and `up.bias`. Costs rank·(d + channels) multiply-adds per token.

    Args:
        dim: model width d.
        channels: key channels of all heads.
        rank: width between the two layers.
        normalizer: a larger one forgets less.

    Raises:
        ValueError: normalizer ≤ 0.
    """

    def __init__(self, dim: int, channels: int, rank: int = 16, normalizer: float = 16.0) -> None:
        super().__init__()
        if normalizer <= 0:
            raise ValueError(f"LowRankDecay: expected normalizer > 0, so that decays are ≤ 0; got {normalizer}.")
        self.normalizer = normalizer
        self.down = FullPrecisionLinear(dim, rank, bias=False)
        self.up = FullPrecisionLinear(rank, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, l, d) to log decays (b, l, channels)."""
        return F.logsigmoid(self.up(self.down(x))) / self.normalizer


class ChannelDecay(nn.Module):
    """KDA's decay, one per key channel: −exp(A_log) · softplus(up(down(x)) + dt_bias) (2510.26692).

    Parameters, as published (fla's f_proj.0, f_proj.1, A_log and dt_bias): `down.weight` (rank, d), `up.weight`
    (channels, rank), `A_log` (h,) and `dt_bias` (channels,). Costs rank·(d + channels) multiply-adds per token.

    Args:
        dim: model width d.
        channels: key channels of all heads.
        heads: number of heads h; divides channels.
        rank: width between the two layers.
        a_range: exp(A_log) is initialized uniformly in this range.
        dt_range: softplus(dt_bias) is initialized log-uniformly in this range.
    """

    def __init__(
        self,
        dim: int,
        channels: int,
        heads: int,
        rank: int,
        a_range: tuple[float, float] = (1.0, 16.0),
        dt_range: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__()
        self.down = FullPrecisionLinear(dim, rank, bias=False)
        self.up = FullPrecisionLinear(rank, channels, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*a_range).log())
        self.dt_bias = nn.Parameter(inverse_softplus_of_log_uniform(channels, *dt_range))

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, l, d) to log decays (b, l, h, channels / h)."""
        step = self.up(self.down(x))
        dt = F.softplus(step + self.dt_bias.to(step.dtype)).unflatten(-1, (len(self.A_log), -1))
        return -dt * self.A_log.to(step.dtype).exp()[:, None]


class DoubleExponentialDecay(nn.Module):
    """RWKV-6's decay, one per key channel: −exp(w) with w = up(tanh(down(x))) (2404.05892).

    w is clamped at 7, where the gate exp(−exp(w)) is 0 even in float64.

    Parameters: `down.weight` (rank, d), initially zero; `up.weight` (channels, rank); `up.bias` (channels,), the
    initial w of every token: −6 + 5 · (i / (channels − 1))^(0.7 + 1.3 depth) for channel i, from slow to fast, as
    published. Costs rank·(d + channels) multiply-adds per token.

    Args:
        dim: model width d.
        channels: key channels of all heads.
        rank: width between the two layers.
        depth: position of the layer in its network, from 0 at the input to 1 at the output.
    """

    def __init__(self, dim: int, channels: int, rank: int = 64, depth: float = 0.5) -> None:
        super().__init__()
        self.down = FullPrecisionLinear(dim, rank, bias=False)
        self.up = FullPrecisionLinear(rank, channels)
        nn.init.zeros_(self.down.weight)
        nn.init.uniform_(self.up.weight, -0.01, 0.01)
        ramp = torch.arange(channels) / max(channels - 1, 1)
        with torch.no_grad():
            self.up.bias.copy_(-6 + 5 * ramp ** (0.7 + 1.3 * depth))

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, l, d) to log decays (b, l, channels)."""
        return -self.up(self.down(x).tanh()).clamp(max=7).exp()
