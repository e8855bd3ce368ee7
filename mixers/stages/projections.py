"""Projections from tokens to queries, keys and values, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from mixers.precision import accumulation_dtype, no_autocast


class ProjectionLayers(Protocol):
    """The four projections that a mixer calls, under diffusers' names."""

    @property
    def to_q(self) -> Any:
        """Queries."""

    @property
    def to_k(self) -> Any:
        """Keys."""

    @property
    def to_v(self) -> Any:
        """Values."""

    @property
    def to_out(self) -> Any:
        """Output: a layer, or several to apply in order."""


class Projections(nn.Module):
    """The four projections under diffusers' names; the defaults are those of Stable Diffusion.

    Args:
        dim: model width d.
        key_width: output channels of to_q and to_k. None: d.
        value_width: output channels of to_v and input channels of to_out. None: d.
        key_input: input channels of to_q and to_k. None: d.
        bias: whether to_out has a bias.
        qkv_bias: whether to_q, to_k and to_v have a bias.
    """

    def __init__(
        self,
        dim: int,
        key_width: int | None = None,
        value_width: int | None = None,
        key_input: int | None = None,
        bias: bool = True,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.to_q = nn.Linear(key_input or dim, key_width or dim, bias=qkv_bias)
        self.to_k = nn.Linear(key_input or dim, key_width or dim, bias=qkv_bias)
        self.to_v = nn.Linear(dim, value_width or dim, bias=qkv_bias)
        self.to_out = nn.Linear(value_width or dim, dim, bias=bias)


def apply_to_out(to_out: Any, x: Tensor) -> Tensor:
    """Apply the output projection: (b, l, h·v) -> (b, l, d).

    Args:
        to_out: a layer, or several to apply in order (diffusers: a ModuleList of Linear and Dropout).
        x: the mixed values.
    """
    layers: Iterable[Callable[[Tensor], Tensor]] = (
        to_out if isinstance(to_out, nn.ModuleList | list | tuple) else [to_out]
    )
    for layer in layers:
        x = layer(x)
    return x


class FullPrecisionLinear(nn.Linear):
    """A linear layer computed in float32 at least, whatever the dtype of its parameters and autocast.

    For small layers whose results are summed over tokens, such as decays. The layer is always called, so that hooks
    which move or cast its weights (CPU offloading, layerwise casting) take effect.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Project (…, in_features) to (…, out_features)."""
        dtype = accumulation_dtype(x, self.weight)
        with no_autocast(x):
            return F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


class LowRankLinear(nn.Module):
    """up(down(x)): a linear layer of low rank, whose bias, if any, is that of `up`.

    Parameters: `down.weight` (rank, in), `up.weight` (out, rank) and `up.bias` (out,).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Project (…, in_features) to (…, out_features)."""
        return self.up(self.down(x))


class ResidualMLP(nn.Module):
    """x + Linear(LeakyReLU(LayerNorm(Linear(x)))), with mid_dim channels inside (LinFusion, 2409.02097 §3.3).

    The last layer starts at zero, so that a new one is the identity. 2·d·mid_dim parameters, and as many multiply-adds
    per token.
    """

    def __init__(self, dim: int, mid_dim: int) -> None:
        super().__init__()
        last = nn.Linear(mid_dim, dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(nn.Linear(dim, mid_dim), nn.LayerNorm(mid_dim), nn.LeakyReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, l, d) to (b, l, d)."""
        return x + self.net(x)
