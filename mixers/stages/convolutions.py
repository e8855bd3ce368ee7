"""Short-range mixing beside the operator: depthwise convolutions over the tokens, or over the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """A depthwise convolution over the tokens, then SiLU: (b, l, channels) -> the same.

    y_i = SiLU(b + Σ_s w_s x_{i−size+1+s}) where causal (Mamba 2312.00752, Mamba-2 2405.21060, Gated DeltaNet
    2412.06464); else the window is centered, and one of even size reaches one token further back than ahead (Hydra
    2407.09941 has size 7). Tokens outside are zeros; any l ≥ 1 will do. size·channels multiply-adds a token.

    Parameters are those of nn.Conv1d, as published: `conv.weight` (channels, 1, size) and `conv.bias` (channels,).

    Args:
        size: tokens in the window.
        causal: token i sees i − size + 1 .. i, else both sides.
        activation: whether SiLU follows.
    """

    def __init__(self, channels: int, size: int, causal: bool, activation: bool = True, bias: bool = True) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"Expected a convolution of size ≥ 1, got {size}.")
        self.before = size - 1 if causal else size // 2
        self.after = size - 1 - self.before
        self.activation = activation
        self.conv = nn.Conv1d(channels, channels, size, groups=channels, bias=bias)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """(b, l, channels) -> the same; of fewer channels, those from `first` on: each is convolved by itself."""
        own = slice(first, first + x.shape[-1])
        weight, bias = self.conv.weight[own, :, None], None if self.conv.bias is None else self.conv.bias[own]
        image = x.mT.unsqueeze(2)  # (b, c, 1, l), channels last in memory: several times faster, but for gradients
        image = image.contiguous() if torch.is_grad_enabled() else image
        wide = max(self.before, self.after)  # the same on both sides, which the convolution does by itself
        y = F.conv2d(image, weight, bias, padding=(0, wide), groups=x.shape[-1]).squeeze(2).mT
        y = y[:, wide - self.before :][:, : x.shape[1]]
        return F.silu(y, inplace=not torch.is_grad_enabled()) if self.activation else y


class LocalConvolution(nn.Module):
    """A depthwise convolution over the image, zero padded: (b, l, channels) -> the same.

    What linear attention lacks and gets added, computed from the values: LePE in MILA (2405.16605), `dwc` in focused
    linear attention (2308.00442). size²·channels multiply-adds a token. Tokens are in raster order.

    Parameters are those of nn.Conv2d, as published: `conv.weight` (channels, 1, size, size) and `conv.bias`.

    Args:
        size: side of the window, odd.
        zero_init: start at zero, so that adding a fresh one changes nothing.
        option: what to set where there is no grid; errors say so.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        bias: bool = True,
        zero_init: bool = False,
        option: str = "local_conv_size=0",
    ) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise ValueError(f"A local convolution has a center: expected an odd size ≥ 1, got {size}.")
        self.option = option
        self.conv = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, bias=bias)
        if zero_init:
            for parameter in self.conv.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """(b, l, channels) -> (b, l, channels); grid = (height, width) with height · width = l.

        Raises:
            ValueError: there is no grid, or it does not fit.
        """
        if grid is None:
            raise ValueError(
                "A local convolution sees neighbors in the image and has to know its size: "
                f"pass grid=(height, width), or do without it by {self.option}."
            )
        height, width = grid
        if height * width != x.shape[1]:
            raise ValueError(f"The grid {(height, width)} has {height * width} places for {x.shape[1]} tokens.")
        y = self.conv(rearrange(x, "b (i j) c -> b c i j", i=height, j=width))
        return rearrange(y, "b c i j -> b (i j) c")
