"""Short-range mixing beside the operator: depthwise convolutions over the tokens or over the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mixers.image_grid import ImageGrid, require_grid


class ShortConvolution(nn.Conv1d):
    """A depthwise convolution over the tokens followed by SiLU, (b, l, channels) -> (b, l, channels).

    Causal: y_i = SiLU(bias + Σ_s w_s x_{i−size+1+s}) (Mamba 2312.00752, Mamba-2 2405.21060, Gated DeltaNet 2412.06464).
    Otherwise the window is centered; one of even size reaches one token further back than ahead (Hydra 2407.09941 uses
    size 7). Tokens outside the sequence are zeros. Costs size·channels multiply-adds per token.

    Parameters, as published: `weight` (channels, 1, size) and `bias` (channels,).

    Args:
        channels: c.
        size: tokens in the window.
        causal: whether token i sees tokens i − size + 1 … i; otherwise both sides.
        activation: whether SiLU follows.
        bias: whether there is a bias.

    Raises:
        ValueError: size < 1.
    """

    def __init__(self, channels: int, size: int, causal: bool, activation: bool = True, bias: bool = True) -> None:
        if size < 1:
            raise ValueError(f"ShortConvolution: expected size ≥ 1, got {size}.")
        super().__init__(channels, channels, size, groups=channels, bias=bias)
        self.before = size - 1 if causal else size // 2
        self.after = size - 1 - self.before
        self.activation = activation

    def forward(self, x: Tensor, grid: ImageGrid | None = None, first: int = 0) -> Tensor:  # type: ignore[override]
        """Convolve (b, l, c) over the tokens.

        Args:
            x: all channels, or some consecutive ones; each channel is convolved independently.
            grid: not needed.
            first: index of the first channel of x.
        """
        channels = slice(first, first + x.shape[-1])
        weight = self.weight[channels, :, None]
        bias = None if self.bias is None else self.bias[channels]
        # (b, c, 1, l) with the channels last in memory is several times faster, except for gradients.
        image = x.mT.unsqueeze(2)
        image = image.contiguous() if torch.is_grad_enabled() else image
        padding = max(self.before, self.after)  # equal on both sides, so that conv2d pads without a copy
        y = F.conv2d(image, weight, bias, padding=(0, padding), groups=x.shape[-1]).squeeze(2).mT
        y = y[:, padding - self.before :][:, : x.shape[1]]
        return F.silu(y, inplace=not torch.is_grad_enabled()) if self.activation else y


class ShortConvolution2d(nn.Conv2d):
    """A zero-padded depthwise convolution over the image followed by SiLU, (b, l, channels) -> (b, l, channels).

    What VSSD (2407.18559) and MILA (2405.16605) use in place of Mamba's convolution over the tokens. Costs
    size²·channels multiply-adds per token. Tokens are in raster order.

    Parameters, as published: `weight` (channels, 1, size, size) and `bias` (channels,).

    Args:
        channels: c.
        size: side of the window, odd.
        bias: whether there is a bias.

    Raises:
        ValueError: size is even or < 1.
    """

    def __init__(self, channels: int, size: int, bias: bool = True) -> None:
        if size < 1 or size % 2 == 0:
            raise ValueError(
                f"ShortConvolution2d: expected an odd size ≥ 1, so that the window is centered; got {size}."
            )
        super().__init__(channels, channels, size, padding=size // 2, groups=channels, bias=bias)

    def forward(self, x: Tensor, grid: ImageGrid | None = None, first: int = 0) -> Tensor:  # type: ignore[override]
        """Convolve (b, l, c) over the image.

        Args:
            x: all channels, or some consecutive ones; each channel is convolved independently.
            grid: (height, width) with height · width = l.
            first: index of the first channel of x.

        Raises:
            ValueError: The grid is missing or does not fit.
        """
        height, width = require_grid(grid, x.shape[1], "A convolution over the image", "conv_2d=False")
        channels = slice(first, first + x.shape[-1])
        bias = None if self.bias is None else self.bias[channels]
        image = rearrange(x, "b (i j) c -> b c i j", i=height, j=width)
        y = F.conv2d(image, self.weight[channels], bias, padding=self.padding, groups=x.shape[-1])
        return F.silu(rearrange(y, "b c i j -> b (i j) c"))


class LocalConvolution(nn.Conv2d):
    """A zero-padded depthwise convolution over the image, (b, l, channels) -> (b, l, channels).

    It adds to linear attention the locality that it lacks, and is computed from the values: LePE in MILA (2405.16605),
    `dwc` in focused linear attention (2308.00442). Costs size²·channels multiply-adds per token. Tokens are in raster
    order.

    Parameters, as published: `weight` (channels, 1, size, size) and `bias` (channels,).

    Args:
        channels: c; if x has a multiple of c channels, consecutive blocks of c share the weights.
        size: side of the window, odd.
        bias: whether there is a bias.
        option: the option that removes it, named by the error about a missing grid.

    Raises:
        ValueError: size is even or < 1.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        bias: bool = True,
        option: str = "local_conv_size=0",
    ) -> None:
        if size < 1 or size % 2 == 0:
            raise ValueError(f"LocalConvolution: expected an odd size ≥ 1, got {size}.")
        super().__init__(channels, channels, size, padding=size // 2, groups=channels, bias=bias)
        self.option = option

    def forward(self, x: Tensor, grid: ImageGrid | None) -> Tensor:  # type: ignore[override]
        """Convolve (b, l, c) over the image.

        Args:
            x: tokens in raster order.
            grid: (height, width) with height · width = l.

        Raises:
            ValueError: The grid is missing or does not fit.
        """
        height, width = require_grid(grid, x.shape[1], "A local convolution", self.option)
        shares = x.shape[-1] // self.in_channels
        image = rearrange(x, "b (i j) (s c) -> (b s) c i j", i=height, j=width, s=shares)
        return rearrange(super().forward(image), "(b s) c i j -> b (i j) (s c)", s=shares)
