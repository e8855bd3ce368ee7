"""A learned table of positions that is added to the keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mixers.image_grid import ImageGrid, require_grid


class PositionTable(nn.Module):
    """Adds one vector per position of the image, (b, l, channels) -> (b, l, channels), as FLatten does to its keys.

    The published table fixes the number of tokens; here it is interpolated bilinearly to other grids.

    Parameters: `weight` (1, channels, size, size), initially zero.

    Args:
        channels: c.
        size: side of the table.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, channels, size, size))

    def forward(self, x: Tensor, grid: ImageGrid | None) -> Tensor:
        """Add the positions.

        Args:
            x: (b, l, c) in raster order.
            grid: (height, width) with height · width = l.

        Raises:
            ValueError: The grid is missing or does not fit.
        """
        size = require_grid(grid, x.shape[1], "A table of positions", "position_table_size=0")
        table: Tensor = self.weight
        if tuple(table.shape[-2:]) != tuple(size):
            table = F.interpolate(table, size=size, mode="bilinear")
        return x + rearrange(table, "1 c i j -> 1 (i j) c").to(x.dtype)
