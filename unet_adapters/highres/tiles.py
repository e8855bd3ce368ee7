"""An image in tiles: where the tiles lie, which part of each counts, and how they are assembled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class TileSpan:
    """A tile along one axis, in latent pixels.

    Attributes:
        start, stop: the computed range: the core plus a halo. The outer part of the halo is discarded, because its
            convolutions see the tile's edge.
        core: (start, stop) of the tile's own range; the cores of all tiles partition the axis.
        blend: (before, after): how far, on both sides of each end of the core, the tile fades into its neighbor.
    """

    start: int
    stop: int
    core: tuple[int, int]
    blend: tuple[int, int]

    def blend_weights(self, factor: int) -> tuple[int, int, Tensor]:
        """Return (start, stop, weights) of the tile's contribution to the image; the weights of all tiles sum to 1.

        Args:
            factor: image pixels per latent pixel; the result is in image pixels.
        """
        before, after = (width * factor for width in self.blend)
        start = self.core[0] * factor - before
        stop = self.core[1] * factor + after
        weights = torch.ones(stop - start)
        if before:
            weights[: 2 * before] *= _ramp(2 * before)
        if after:
            weights[-2 * after :] *= _ramp(2 * after).flip(0)
        return start, stop, weights


def _ramp(width: int) -> Tensor:
    return (torch.arange(width) + 0.5) / width


def split_into_tiles(total: int, tile: int, margin: int, blend: int) -> list[TileSpan]:
    """Split an axis of `total` latent pixels into tiles of equal size, up to rounding.

    Args:
        tile: upper limit of a core's size.
        margin: width of the discarded halo; there is none at the ends of the axis.
        blend: how far a tile reaches into its neighbor's core to fade into it.
    """
    return list(_tiles(total, -(-total // tile), margin, blend))


def _tiles(total: int, count: int, margin: int, blend: int) -> Iterator[TileSpan]:
    edges = [round(index * total / count) for index in range(count + 1)]
    for start, stop in pairwise(edges):
        before = blend if start > 0 else 0
        after = blend if stop < total else 0
        yield TileSpan(
            max(0, start - margin - before), min(total, stop + margin + after), (start, stop), (before, after)
        )


class ImageCanvas:
    """A uint8 image on the CPU that is assembled from rows of tiles, from top to bottom.

    Memory: height · width · 3 bytes, plus float32 for the rows that are not complete yet.
    """

    def __init__(self, height: int, width: int) -> None:
        self.pixels = torch.empty(height, width, 3, dtype=torch.uint8)
        self._pending = torch.zeros(0, width, 3)
        self._completed_rows = 0

    def add(self, pixels: Tensor, rows: tuple[int, int, Tensor], columns: tuple[int, int, Tensor]) -> None:
        """Add a tile.

        Args:
            pixels: (3, h, w) with values in [-1, 1].
            rows, columns: (start, stop, weights) from `TileSpan.blend_weights`.
        """
        top, bottom, row_weights = rows
        left, right, column_weights = columns
        missing = bottom - self._completed_rows - len(self._pending)
        if missing > 0:
            self._pending = torch.cat([self._pending, self._pending.new_zeros(missing, *self._pending.shape[1:])])
        weighted = pixels.permute(1, 2, 0) * (row_weights[:, None] * column_weights)[..., None]
        self._pending[top - self._completed_rows : bottom - self._completed_rows, left:right] += weighted

    def complete_rows(self, until: int) -> None:
        """Convert all rows before `until` to uint8; no later tile may touch them."""
        count = until - self._completed_rows
        complete = self._pending[:count]
        self._pending = self._pending[count:].clone()
        self.pixels[self._completed_rows : until] = ((complete.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        self._completed_rows = until
