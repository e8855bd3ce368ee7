"""An image in tiles: where they lie, what of them counts, and how they are put together again."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """A tile along one axis, in places of a grid of `total`.

    Attributes:
        start, stop: what is computed: the core and a halo, whose outer part sees the tile's edge and is thrown away.
        core: (start, stop) of the places that are this tile's own; those of all tiles make up the axis.
        blend: (before, after): how many places beyond each end of the core, and as many inside, fade into the next.
    """

    start: int
    stop: int
    core: tuple[int, int]
    blend: tuple[int, int]

    def weights(self, factor: int) -> tuple[int, int, Tensor]:
        """(start, stop, weights) of what goes on the canvas, `factor` pixels a place; weights of all tiles sum to 1."""
        before, after = (n * factor for n in self.blend)
        start, stop = self.core[0] * factor - before, self.core[1] * factor + after
        weights = torch.ones(stop - start)
        if before:
            weights[: 2 * before] *= _ramp(2 * before)
        if after:
            weights[-2 * after :] *= _ramp(2 * after).flip(0)
        return start, stop, weights


def _ramp(width: int) -> Tensor:
    return (torch.arange(width) + 0.5) / width


def spans(total: int, tile: int, margin: int, blend: int) -> list[Span]:
    """Cover `total` places by tiles with cores of `tile`, or a little fewer so that all are alike.

    Args:
        margin: places of halo that are thrown away; where the axis ends there is none.
        blend: places beyond a core that fade into the neighbor's.
    """
    count = -(-total // tile)
    edges = [round(i * total / count) for i in range(count + 1)]
    found = []
    for a, b in pairwise(edges):
        fade = (blend if a > 0 else 0, blend if b < total else 0)
        found.append(Span(max(0, a - margin - fade[0]), min(total, b + margin + fade[1]), (a, b), fade))
    return found


class Canvas:
    """An image of uint8 on the CPU that tiles are added to, row of tiles by row of tiles.

    Memory: the image, height · width · 3 bytes, and in float32 the rows that are not finished.
    """

    def __init__(self, height: int, width: int) -> None:
        self.pixels = torch.empty(height, width, 3, dtype=torch.uint8)
        self._open = torch.zeros(0, width, 3)
        self._done = 0

    def add(self, pixels: Tensor, rows: tuple[int, int, Tensor], columns: tuple[int, int, Tensor]) -> None:
        """Add a tile's pixels (3, h, w) in [-1, 1] with the weights of its rows and columns."""
        (top, bottom, down), (left, right, across) = rows, columns
        missing = bottom - self._done - len(self._open)
        if missing > 0:
            self._open = torch.cat([self._open, self._open.new_zeros(missing, *self._open.shape[1:])])
        weighted = pixels.permute(1, 2, 0) * (down[:, None] * across)[..., None]
        self._open[top - self._done : bottom - self._done, left:right] += weighted

    def finish(self, until: int) -> None:
        """No tile will touch the rows before `until` again: they become uint8."""
        ready, self._open = self._open[: until - self._done], self._open[until - self._done :].clone()
        self.pixels[self._done : until] = ((ready.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        self._done = until
