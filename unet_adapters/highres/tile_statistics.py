"""Group norms that use the statistics of the whole image while they see one tile of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unet_adapters.highres.tiles import TileSpan


@dataclass
class GroupNormStatistics:
    """Mean and variance of one group norm's input, accumulated over the cores of all tiles.

    Attributes:
        count, total, square: number of elements, sum and sum of squares (groups,) accumulated so far.
        mean, variance: (groups,), the statistics in use; None until the first accumulation is complete.
    """

    count: float = 0.0
    total: Any = 0.0
    square: Any = 0.0
    mean: Tensor | None = None
    variance: Tensor | None = None

    def accumulate(self, x: Tensor) -> None:
        """Add the elements of x (groups, channels, height, width), without a temporary tensor of its size."""
        count = x[0].numel()
        variance, mean = (part.double() for part in torch.var_mean(x.float(), dim=(1, 2, 3), correction=0))
        self.count += count
        self.total = self.total + mean * count
        self.square = self.square + (variance + mean * mean) * count

    def finalize(self) -> None:
        """Use the accumulated statistics from now on, and start a new accumulation."""
        mean = self.total / self.count
        self.mean = mean
        self.variance = (self.square / self.count - mean * mean).clamp(min=0)
        self.count = 0.0
        self.total = 0.0
        self.square = 0.0


@dataclass
class TileStatistics:
    """State that all group norms of a network share.

    Attributes:
        accumulating: whether the norms accumulate statistics now.
        rows, columns: the tile that the network sees now.
        norms: the statistics of each group norm.
    """

    accumulating: bool = False
    rows: TileSpan | None = None
    columns: TileSpan | None = None
    norms: list[GroupNormStatistics] = field(default_factory=list)

    def start(self, rows: TileSpan, columns: TileSpan) -> None:
        """Accumulate the statistics of the tile that the network sees next."""
        self.accumulating = True
        self.rows = rows
        self.columns = columns

    def finalize(self) -> None:
        """Stop accumulating and use the accumulated statistics from now on."""
        self.accumulating = False
        for norm in self.norms:
            norm.finalize()


class TiledGroupNorm(nn.GroupNorm):
    """A group norm of a tile with the statistics of the whole image.

    Attributes:
        shared: the state of all norms of the network.
        statistics: its own statistics; without any it is a plain group norm.
    """

    shared: TileStatistics
    statistics: GroupNormStatistics

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (1, c, h, w) or (1, c, l)."""
        if self.shared.accumulating:
            self.statistics.accumulate(self._core(x).unflatten(0, (self.num_groups, -1)))
        mean = self.statistics.mean
        variance = self.statistics.variance
        if mean is None or variance is None:
            return super().forward(x)
        inverse_std = (variance + self.eps).rsqrt()
        channels_per_group = x.shape[1] // self.num_groups
        scale = inverse_std.repeat_interleave(channels_per_group) * self.weight.to(inverse_std.dtype)
        shift = self.bias.to(inverse_std.dtype) - mean.repeat_interleave(channels_per_group) * scale
        shape = (1, -1, *(1,) * (x.ndim - 2))
        return torch.addcmul(shift.to(x.dtype).view(shape), x, scale.to(x.dtype).view(shape))

    def _core(self, x: Tensor) -> Tensor:
        rows = self.shared.rows
        columns = self.shared.columns
        assert rows is not None and columns is not None
        if x.ndim == 3:  # attention normalizes (1, c, l)
            x = x.unflatten(-1, (rows.stop - rows.start, columns.stop - columns.start))
        vertical = x.shape[-2] / (rows.stop - rows.start)  # levels of the autoencoder differ in resolution
        horizontal = x.shape[-1] / (columns.stop - columns.start)
        top, bottom = (round((edge - rows.start) * vertical) for edge in rows.core)
        left, right = (round((edge - columns.start) * horizontal) for edge in columns.core)
        return x[0, :, top:bottom, left:right]


@contextmanager
def tiled_group_norms(networks: Sequence[nn.Module]) -> Iterator[TileStatistics]:
    """Replace the group norms of `networks` by tiled ones inside; yields the state that they share."""
    norms = [module for network in networks for module in network.modules() if type(module) is nn.GroupNorm]
    shared = TileStatistics(norms=[GroupNormStatistics() for _ in norms])
    try:
        for norm, statistics in zip(norms, shared.norms, strict=True):
            norm.__class__ = TiledGroupNorm
            norm.__dict__["shared"] = shared
            norm.__dict__["statistics"] = statistics
        yield shared
    finally:
        for norm in norms:
            norm.__class__ = nn.GroupNorm
            norm.__dict__.pop("shared", None)
            norm.__dict__.pop("statistics", None)
