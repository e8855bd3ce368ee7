"""Where objects go: boxes at random places, on two sides, in mirrored pairs or on a lattice; lengths are in units.

Boxes have two sizes and lie on a grid of 1/8 unit, 8 px at the training scale. An autoencoder that makes one latent
pixel of 4 × 4 pixels then gives copies of a drawing equal latents, also after a UNet has halved them once. A denoiser
sees each drawing in two forms again and again, where free positions and sizes would hardly ever repeat one.
"""

from __future__ import annotations

from numpy.random import Generator

Box = tuple[float, float, float]
"""Left, top and side of a square box."""
Canvas = tuple[float, float]
"""Width and height."""

CELLS = 8
"""Grid cells along one unit."""
GAP = 1
"""Least distance between boxes, in cells."""
SIDE = 3
"""Side of a box, in cells."""
LONE_SIDE = 6
"""Side of a box that has one unit for itself, in cells."""
_ATTEMPTS = 8


def scatter(rng: Generator, count: int, canvas: Canvas) -> list[Box]:
    """Return `count` boxes of one side that do not touch, at random places.

    The side is that of `count / area` objects on one unit, so a larger canvas shows more objects of the same size. It
    shrinks, cell by cell, if they do not fit. Where random places leave too little room, boxes stand in rows.

    Raises:
        ValueError: not even boxes of one cell fit.
    """
    width, height = _cells(canvas)
    is_lone = count / (canvas[0] * canvas[1]) < 1.5
    for side in range(min(LONE_SIDE if is_lone else SIDE, width, height), 0, -1):
        for _ in range(_ATTEMPTS):
            corners = _try_scatter(rng, count, side, (width, height))
            if corners is not None:
                return _boxes(corners, side)
        slots = _rows_of_corners(side, (width, height))
        if len(slots) >= count:
            return _boxes([slots[index] for index in rng.permutation(len(slots))[:count]], side)
    raise ValueError(f"Cannot place {count} objects on {width} × {height} cells of 1/{CELLS} unit: draw fewer objects.")


def split_sides(rng: Generator, count: int, canvas: Canvas, side_of_first: str) -> tuple[list[Box], list[Box]]:
    """Return the boxes of a first and of a second object, `count // 2` each, on two sides of the canvas.

    Args:
        rng: source of randomness.
        count: boxes in all, at least 2.
        canvas: width and height.
        side_of_first: `"left"` or `"above"`.
    """
    width, height = canvas
    across = side_of_first == "left"
    half = (width / 2, height) if across else (width, height / 2)
    first = _fill_half(rng, count // 2, half)
    second = _fill_half(rng, count // 2, half)
    shift = (width / 2, 0.0) if across else (0.0, height / 2)
    return first, [(x + shift[0], y + shift[1], side) for x, y, side in second]


def mirror_pairs(rng: Generator, pairs: int, canvas: Canvas, axis: str) -> list[tuple[Box, Box]]:
    """Return pairs of boxes that mirror each other across the canvas's center; `axis` "x" mirrors left and right."""
    width, height = canvas
    boxes = _fill_half(rng, pairs, (width / 2, height) if axis == "x" else (width, height / 2))
    if axis == "x":
        return [((x, y, side), (width - x - side, y, side)) for x, y, side in boxes]
    return [((x, y, side), (x, height - y - side, side)) for x, y, side in boxes]


def lattice(rng: Generator, canvas: Canvas) -> list[tuple[int, int, Box]]:
    """Return (row, column, box) of a regular lattice that fills the canvas: 2 × 2 boxes on one unit.

    Its boxes are those of scattered objects, so that a drawing has the same latents in both.
    """
    width, height = _cells(canvas)
    side = min(SIDE, width, height)
    corners = _rows_of_corners(side, (width, height))
    last_x, last_y = corners[-1]
    left = int(rng.integers(0, width - side - last_x + 1))
    top = int(rng.integers(0, height - side - last_y + 1))
    boxes = _boxes([(left + x, top + y) for x, y in corners], side)
    return [(y // (side + GAP), x // (side + GAP), box) for (x, y), box in zip(corners, boxes, strict=True)]


def _fill_half(rng: Generator, count: int, half: Canvas) -> list[Box]:
    """Boxes on one half of a canvas; single ones leave a gap to the middle."""
    if count > 1:
        return scatter(rng, count, half)
    width, height = _cells(half)
    side = min(SIDE, width - GAP, height - GAP)
    return _boxes([(int(rng.integers(0, width - side)), int(rng.integers(0, height - side)))], side)


def _rows_of_corners(side: int, cells: tuple[int, int]) -> list[tuple[int, int]]:
    """Left upper corners of as many boxes as fit in rows, a gap apart, from the upper left on."""
    width, height = cells
    pitch = side + GAP
    return [(x, y) for y in range(0, height - side + 1, pitch) for x in range(0, width - side + 1, pitch)]


def _try_scatter(rng: Generator, count: int, side: int, cells: tuple[int, int]) -> list[tuple[int, int]] | None:
    """Left upper corners in cells, or None if one box found no place."""
    width, height = cells
    corners: list[tuple[int, int]] = []
    for _ in range(count):
        for _ in range(_ATTEMPTS):
            x = int(rng.integers(0, width - side + 1))
            y = int(rng.integers(0, height - side + 1))
            if all(max(abs(x - left), abs(y - top)) >= side + GAP for left, top in corners):
                corners.append((x, y))
                break
        else:
            return None
    return corners


def _boxes(corners: list[tuple[int, int]], side: int) -> list[Box]:
    return [(x / CELLS, y / CELLS, side / CELLS) for x, y in corners]


def _cells(canvas: Canvas) -> tuple[int, int]:
    """Width and height of a canvas in cells."""
    width, height = canvas
    return int(width * CELLS), int(height * CELLS)
