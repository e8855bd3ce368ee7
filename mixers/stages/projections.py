"""Tokens -> queries, keys and values, and back."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mixers.precision import accumulation_dtype, no_autocast


class Projections(nn.Module):
    """The four projections under diffusers' names; to_q, to_k and to_v have no bias, as in Stable Diffusion.

    Args:
        dim: model width d.
        key_width: channels of to_q and to_k; None is d.
        value_width: channels of to_v, which to_out takes back to d; None is d.
        key_input: channels that to_q and to_k see; None is d.
        bias: whether to_out has one.
    """

    def __init__(
        self,
        dim: int,
        key_width: int | None = None,
        value_width: int | None = None,
        key_input: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        key_width, value_width, key_input = (w or dim for w in (key_width, value_width, key_input))
        self.to_q = nn.Linear(key_input, key_width, bias=False)
        self.to_k = nn.Linear(key_input, key_width, bias=False)
        self.to_v = nn.Linear(dim, value_width, bias=False)
        self.to_out = nn.Linear(value_width, dim, bias=bias)


def apply_to_out(to_out: Any, x: Tensor) -> Tensor:
    """Apply `to_out`, a module, or several in order (diffusers: a ModuleList of Linear and Dropout): (b, l, d)."""
    for part in to_out if isinstance(to_out, nn.ModuleList | list | tuple) else [to_out]:
        x = part(x)
    return x


class ResidualMLP(nn.Module):
    """x + Linear(mid -> d)(LeakyReLU(LayerNorm(Linear(d -> mid)(x)))): LinFusion's input to to_q and to_k.

    The last layer starts at zero, so a fresh one is the identity. 2·d·mid parameters and as many
    multiply-adds a token (2409.02097 §3.3).
    """

    def __init__(self, dim: int, mid_dim: int) -> None:
        super().__init__()
        last = nn.Linear(mid_dim, dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(nn.Linear(dim, mid_dim), nn.LayerNorm(mid_dim), nn.LeakyReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, d)."""
        return x + self.net(x)


def linear_in_full_precision(layer: nn.Linear, x: Tensor) -> Tensor:
    """A projection in float32 at least, whatever the parameters' dtype and autocast say: (…, in) -> (…, out)."""
    dtype = accumulation_dtype(x, layer.weight)
    with no_autocast(x):
        return F.linear(x.to(dtype), layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))
