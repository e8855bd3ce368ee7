"""Softmax over a circular window of the image (CLEAR, 2412.16112), computed in tiles."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mixers.image_grid import ImageGrid, check_grid
from mixers.precision import accumulation_dtype
from mixers.traits import Causality

SMALLEST_TILE = 4
"""Side of the smallest tile of queries, so that windows of few tokens still make matrix products."""

BAND_ELEMENTS = 1 << 24
"""Gathered keys of the tiles that are computed at once."""


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: ImageGrid, radius: int, causality: Causality = "noncausal"
) -> Tensor:
    """Compute softmax attention over the tokens nearer than `radius` in the image.

    Token i sees token j if (y_i − y_j)² + (x_i − x_j)² < radius², as in CLEAR. Queries are computed in square tiles,
    each with the keys of the tile and of a margin of radius − 1 around it: O(l·radius²) time, about 9·radius² keys for
    the π·radius² that a query sees. Images not larger than such a tile and its margin are computed at once.

    Args:
        q: queries (b, l, h, k), in raster order.
        k: keys (b, l, h, k).
        v: values (b, l, h, v).
        grid: (height, width) of the image, with height · width = l.
        radius: ≥ 1; 1 is the token itself.
        causality: `noncausal`, or `causal`: of these tokens, those that do not come later in raster order.

    Returns:
        (b, l, h, v) in v's dtype.

    Raises:
        ValueError: The grid does not have l positions.
    """
    check_grid(grid, q.shape[1])
    height, width = grid
    margin = radius - 1
    tile = max(SMALLEST_TILE, radius)
    if (tile + 2 * margin) ** 2 >= height * width:
        offsets = _offsets((height, width), (height, width), 0, q.device)
        visible = _is_visible(*offsets, radius, causality)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible)
        return y.transpose(1, 2)
    return _attend_in_tiles(q, k, v, grid, radius, causality, tile)


def window_attention_matrix(
    q: Tensor, k: Tensor, grid: ImageGrid, radius: int, causality: Causality = "noncausal"
) -> Tensor:
    """Return the matrix (b, h, l, l) that `window_attention` applies to v, from the formula. Costs O(l²) memory."""
    check_grid(grid, q.shape[1])
    index = torch.arange(q.shape[1], device=q.device)
    rows = index // grid[1]
    columns = index % grid[1]
    squared = (rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2
    hidden = squared >= radius**2
    if causality == "causal":
        hidden = hidden | (index > index[:, None])
    dtype = accumulation_dtype(q)
    scores = torch.einsum("bihk,bjhk->bhij", q.to(dtype), k.to(dtype)) / math.sqrt(q.shape[-1])
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def _attend_in_tiles(
    q: Tensor, k: Tensor, v: Tensor, grid: ImageGrid, radius: int, causality: Causality, tile: int
) -> Tensor:
    """Attend from tiles of tile × tile queries to windows of (tile + 2·radius − 2)² keys, one band of tiles a time."""
    batch, _, heads, _ = q.shape
    margin = radius - 1
    side = tile + 2 * margin
    rows = -(-grid[0] // tile)
    columns = -(-grid[1] // tile)
    pad = (rows * tile - grid[0], columns * tile - grid[1])
    queries = _image(q, grid, 0, pad)
    keys = _image(k, grid, margin, pad)
    values = _image(v, grid, margin, pad)
    exists = F.pad(q.new_ones(grid, dtype=torch.bool), (margin, margin + pad[1], margin, margin + pad[0]))
    dy, dx = _offsets((tile, tile), (side, side), margin, q.device)
    visible = _is_visible(dy, dx, radius, causality)
    itself = _as_matrix((dy == 0) & (dx == 0))  # keeps queries that only pad the image from having no key at all

    def attend(first: int, last: int) -> Tensor:
        """Compute the rows of tiles from `first` to before `last`: (b, rows, columns, h, v)."""
        span = slice(first * tile, last * tile)
        window_span = slice(first * tile, last * tile + 2 * margin)
        windows = exists[window_span].unfold(0, side, tile).unfold(1, side, tile).reshape(-1, 1, side**2)
        tiles = F.scaled_dot_product_attention(
            _tiles(queries[:, span], tile, tile),
            _tiles(keys[:, window_span], side, tile),
            _tiles(values[:, window_span], side, tile),
            attn_mask=((windows & visible) | itself)[:, None],
        )
        return _join_tiles(tiles, heads, columns, tile)

    if torch.compiler.is_compiling():  # which would unroll the loop over bands
        image = attend(0, rows)
    else:
        band = max(1, BAND_ELEMENTS // max(1, columns * side**2 * batch * heads * k.shape[-1]))
        bands = [attend(first, min(first + band, rows)) for first in range(0, rows, band)]
        image = torch.cat(bands, dim=1)
    return image[:, : grid[0], : grid[1]].flatten(1, 2)


def _offsets(tile: ImageGrid, window: ImageGrid, margin: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows and columns from every position of a tile to every position of its window.

    Returns:
        (tile height, 1, window height, 1) and (1, tile width, 1, window width), so that only the mask has an entry for
        every pair.
    """
    rows, columns = (torch.arange(n, device=device) for n in tile)
    window_rows, window_columns = (torch.arange(n, device=device) - margin for n in window)
    return (window_rows - rows[:, None])[:, None, :, None], (window_columns - columns[:, None])[None, :, None, :]


def _is_visible(dy: Tensor, dx: Tensor, radius: int, causality: Causality) -> Tensor:
    """Return which positions of the window are visible, (tile, window)."""
    visible = dx**2 < radius**2 - dy**2  # dy² + dx² would be an integer for every pair
    if causality == "causal":
        visible = visible & ((dy < 0) | ((dy == 0) & (dx <= 0)))
    return _as_matrix(visible)


def _as_matrix(pairs: Tensor) -> Tensor:
    """(tile height, tile width, window height, window width) -> (tile, window)."""
    return pairs.flatten(2).flatten(0, 1)


def _image(x: Tensor, grid: ImageGrid, margin: int, pad: tuple[int, int]) -> Tensor:
    """Lay tokens (b, l, h, ·) out as an image with zeros around it: (b, rows, columns, h, ·)."""
    return F.pad(x.unflatten(1, grid), (0, 0, 0, 0, margin, margin + pad[1], margin, margin + pad[0]))


def _tiles(image: Tensor, side: int, step: int) -> Tensor:
    """Cut an image (b, rows, columns, h, ·) into squares `step` apart: (tiles, b·h, side², ·)."""
    squares = image.unfold(1, side, step).unfold(2, side, step)  # (b, rows, columns, h, ·, side, side)
    squares = squares.permute(1, 2, 0, 3, 5, 6, 4)
    return squares.flatten(4, 5).flatten(2, 3).flatten(0, 1)


def _join_tiles(tiles: Tensor, heads: int, columns: int, side: int) -> Tensor:
    """Undo `_tiles` for squares that do not overlap: (tiles, b·h, side², ·) -> (b, rows, columns, h, ·)."""
    squares = tiles.unflatten(2, (side, side)).unflatten(1, (-1, heads)).unflatten(0, (-1, columns))
    return squares.permute(2, 0, 4, 1, 5, 3, 6).flatten(3, 4).flatten(1, 2)
