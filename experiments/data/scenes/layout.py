"""Where objects go: boxes at random places, on two sides, in mirrored pairs or on a lattice; lengths are in units.

Boxes have few sizes and lie on a grid of 1/16 unit, 4 px at the training scale. An autoencoder that makes one latent
pixel of 4 × 4 pixels then gives copies of a drawing equal latents, and a denoiser sees each drawing in a handful of
forms again and again, where free positions and sizes would hardly ever repeat one.
"""

from __future__ import annotations

from numpy.random import Generator

Box = tuple[float, float, float]
"""Left, top and side of a square box."""
Canvas = tuple[float, float]
"""Width and height."""

CELLS = 16
"""Grid cells along one unit."""
GAP = 1
"""Least distance between boxes, in cells."""
SIDES = {1: (10, 12, 14), 2: (6, 7), 3: (6,), 4: (5, 6)}
"""Sides of boxes in cells, by the number of boxes on one unit."""
HALF_SIDES = (6, 7)
"""Sides of a box that has half a unit for itself, in cells."""
LATTICE_SHARE = 0.9
"""Side of a lattice's boxes over its pitch."""
_ATTEMPTS = 12


def scatter(rng: Generator, count: int, canvas: Canvas) -> list[Box]:
    """Return `count` boxes of one random side that do not touch.

    The side is that of `count / area` objects on one unit, so a larger canvas shows more objects of the same size. It
    shrinks, cell by cell, if they do not fit.
    """
    width, height = canvas
    density = min(4, max(1, round(count / (width * height))))
    side = min(int(rng.choice(SIDES[density])), *_cells(canvas))
    while True:
        for _ in range(_ATTEMPTS):
            boxes = _try_scatter(rng, count, side, canvas)
            if boxes is not None:
                return boxes
        side = max(1, side - 1)


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


def lattice(rng: Generator, per_unit: int, canvas: Canvas) -> list[tuple[int, int, Box]]:
    """Return (row, column, box) of a regular lattice with `per_unit` boxes per unit that fills the canvas."""
    columns, rows = (max(1, round(per_unit * length)) for length in canvas)
    width, height = _cells(canvas)
    pitch = min(width // columns, height // rows)
    side = LATTICE_SHARE * pitch
    margin = (pitch - side) / 2
    left, top = (
        int(rng.integers(0, length - number * pitch + 1)) + margin
        for length, number in ((width, columns), (height, rows))
    )
    return [
        (row, column, ((left + column * pitch) / CELLS, (top + row * pitch) / CELLS, side / CELLS))
        for row in range(rows)
        for column in range(columns)
    ]


def _fill_half(rng: Generator, count: int, half: Canvas) -> list[Box]:
    """Boxes on one half of a canvas; single ones leave a gap to the middle."""
    if count > 1:
        return scatter(rng, count, half)
    width, height = _cells(half)
    side = min(int(rng.choice(HALF_SIDES)), width - GAP, height - GAP)
    x, y = (int(rng.integers(0, length - side)) for length in (width, height))
    return [(x / CELLS, y / CELLS, side / CELLS)]


def _try_scatter(rng: Generator, count: int, side: int, canvas: Canvas) -> list[Box] | None:
    boxes: list[tuple[int, int]] = []
    width, height = _cells(canvas)
    for _ in range(count):
        for _ in range(_ATTEMPTS):
            x = int(rng.integers(0, width - side + 1))
            y = int(rng.integers(0, height - side + 1))
            if all(max(abs(x - left), abs(y - top)) >= side + GAP for left, top in boxes):
                boxes.append((x, y))
                break
        else:
            return None
    return [(x / CELLS, y / CELLS, side / CELLS) for x, y in boxes]


def _cells(canvas: Canvas) -> tuple[int, int]:
    """Width and height of a canvas in cells."""
    width, height = canvas
    return int(width * CELLS), int(height * CELLS)
