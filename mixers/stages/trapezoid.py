"""Mamba-3's discretization: step sizes, decays, the trapezoid's weights and the angles of a rotating state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers.precision import accumulation_dtype, widest_dtype
from mixers.stages.decays import inverse_softplus_of_log_uniform
from mixers.stages.projections import FullPrecisionLinear
from mixers.suggest import unknown_name


def heavy_tail(x: Tensor) -> Tensor:
    """Return 1 + x for x ≥ 0 and 1 / (1 − x) below, which is positive with a slope of at most 1."""
    return x.clamp(min=0) + (1 - x.clamp(max=0)).reciprocal()


RATE_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"heavy_tail": heavy_tail, "softplus": F.softplus}
"""Functions that make decay rates positive, by name: of mamba_ssm, and of fla."""

SLOWEST_RATE = 1e-4


class Discretization(NamedTuple):
    """What `TrapezoidalDiscretization` computes for every token, float32 at least.

    Attributes:
        dt: Δ > 0, (b, l, h).
        log_decay: Δ·A < 0, (b, l, h).
        trapezoid: λ in (0, 1), (b, l, h): the share of a step that its own token gets.
        angles: by which a step rotates pairs of channels, (b, l, h, pairs); None if the state does not rotate.
    """

    dt: Tensor
    log_decay: Tensor
    trapezoid: Tensor
    angles: Tensor | None


class TrapezoidalDiscretization(nn.Module):
    """Δ, Δ·A, λ and the angles of every token (Mamba-3, 2603.15569).

    Δ = softplus(to_dt(x) + dt_bias), A = −max(rate(to_rate(x)), 1e-4), λ = σ(to_trapezoid(x)), and
    angles = π tanh(to_angles(x)) Δ, where all heads share to_angles.

    Parameters: `to_dt.weight`, `to_rate.weight` and `to_trapezoid.weight` (h, d), `to_angles.weight` (pairs, d) and
    `dt_bias` (h,). Costs d·(3 h + pairs) multiply-adds per token.

    Args:
        dim: model width d.
        heads: number of heads h.
        pairs: number of pairs of channels that rotate; 0: none.
        rate: name of the function that makes decay rates positive, a key of `RATE_FUNCTIONS`.
        bias: whether the four layers have biases.

    Raises:
        ValueError: The function is unknown.
    """

    def __init__(self, dim: int, heads: int, pairs: int, rate: str = "heavy_tail", bias: bool = False) -> None:
        super().__init__()
        if rate not in RATE_FUNCTIONS:
            raise ValueError(unknown_name("rate function", rate, RATE_FUNCTIONS))
        self.rate = rate
        self.to_dt = FullPrecisionLinear(dim, heads, bias=bias)
        self.to_rate = FullPrecisionLinear(dim, heads, bias=bias)
        self.to_trapezoid = FullPrecisionLinear(dim, heads, bias=bias)
        self.to_angles = FullPrecisionLinear(dim, pairs, bias=bias) if pairs else None
        self.dt_bias = nn.Parameter(inverse_softplus_of_log_uniform(heads, 1e-3, 1e-1))

    def forward(self, x: Tensor) -> Discretization:
        """Discretize tokens (b, l, d)."""
        step = self.to_dt(x)
        dt = F.softplus(step + self.dt_bias.to(step.dtype))
        rates = RATE_FUNCTIONS[self.rate](self.to_rate(x)).clamp(min=SLOWEST_RATE)
        angles = None
        if self.to_angles is not None:
            angles = math.pi * self.to_angles(x).tanh()[:, :, None] * dt[..., None]
        return Discretization(dt, -dt * rates, self.to_trapezoid(x).sigmoid(), angles)


def rotate_cumulatively(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of channels by the angles of all steps up to each token's own.

    Args:
        x: (b, l, h, k), whose channels (0, 1), (2, 3), … are the pairs.
        angles: of every step, (b, l, h, pairs) with at most k / 2 pairs; further channels stay as they are.

    Returns:
        (b, l, h, k) in the dtype of x.
    """
    # Sums of many angles lose their last digits; in float64 those of a million tokens keep what float32 resolves.
    total = angles.to(widest_dtype(angles.device)).cumsum(1).remainder(2 * math.pi).to(accumulation_dtype(x))
    rotated, rest = x.split([2 * angles.shape[-1], x.shape[-1] - 2 * angles.shape[-1]], dim=-1)
    first, second = rotated.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = (first * total.cos() - second * total.sin(), first * total.sin() + second * total.cos())
    return torch.cat([torch.stack(pairs, dim=-1).flatten(-2).to(x.dtype), rest], dim=-1)
