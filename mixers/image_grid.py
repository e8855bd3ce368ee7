"""The size of the image that tokens come from."""

from __future__ import annotations

ImageGrid = tuple[int, int]
"""(height, width), with height · width = number of tokens, in raster order."""


def check_grid(grid: ImageGrid, length: int) -> None:
    """Raise ValueError if the grid does not have `length` positions."""
    height, width = grid
    if height * width != length:
        raise ValueError(f"grid={(height, width)} has {height * width} positions, but there are {length} tokens.")


def require_grid(grid: ImageGrid | None, length: int, part: str, alternative: str = "") -> ImageGrid:
    """Return the grid, which must be given and fit.

    Args:
        grid: (height, width), or None if not given.
        length: number of tokens.
        part: what needs the grid, as the subject of the error message.
        alternative: an option that does without, such as "local_conv_size=0".

    Raises:
        ValueError: The grid is missing, or does not have `length` positions.
    """
    if grid is None:
        otherwise = f", or use {alternative}" if alternative else ""
        raise ValueError(f"{part} needs the size of the image: pass grid=(height, width){otherwise}.")
    check_grid(grid, length)
    return grid
