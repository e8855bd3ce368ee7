"""Where objects go: boxes at random places, on two sides, in mirrored pairs or on a lattice; lengths are in units."""

from __future__ import annotations

from numpy.random import Generator

Box = tuple[float, float, float]
"""Left, top and side of a square box."""
Canvas = tuple[float, float]
"""Width and height."""

GAP = 0.035
"""Least distance between boxes, and from the border: about two pixels at 64 px."""
LARGEST = {1: 0.92, 2: 0.52, 3: 0.43, 4: 0.42}
SMALLEST = {1: 0.62, 2: 0.42, 3: 0.36, 4: 0.35}
HALF = (0.38, 0.5 - 1.5 * GAP)
"""Range of the side of a box that has half a unit for itself."""
_ATTEMPTS = 12


def scatter(rng: Generator, count: int, canvas: Canvas) -> list[Box]:
    """Return `count` boxes of one random side that do not touch, as large as the canvas allows.

    The side is that of `count / area` objects on one unit, so a larger canvas shows more objects of the same size.
    """
    width, height = canvas
    density = min(4, max(1, round(count / (width * height))))
    side = min(float(rng.uniform(SMALLEST[density], LARGEST[density])), min(canvas) - 2 * GAP)
    while True:
        for _ in range(_ATTEMPTS):
            boxes = _try_scatter(rng, count, side, canvas)
            if boxes is not None:
                return boxes
        side *= 0.97


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
    pitch = min(canvas[0] / columns, canvas[1] / rows)
    side = pitch * float(rng.uniform(0.84, 0.92))
    slack = pitch - side
    left = (canvas[0] - columns * pitch) / 2 + float(rng.uniform(0.2, 0.8)) * slack
    top = (canvas[1] - rows * pitch) / 2 + float(rng.uniform(0.2, 0.8)) * slack
    return [
        (row, column, (left + column * pitch, top + row * pitch, side))
        for row in range(rows)
        for column in range(columns)
    ]


def _fill_half(rng: Generator, count: int, half: Canvas) -> list[Box]:
    """Boxes on one half of a canvas, half a gap away from the middle."""
    if count > 1:
        return scatter(rng, count, half)
    side = float(rng.uniform(*HALF)) * min(max(half), 2 * min(half))
    x, y = (float(rng.uniform(GAP, max(GAP, length - side - GAP / 2))) for length in half)
    return [(x, y, side)]


def _try_scatter(rng: Generator, count: int, side: float, canvas: Canvas) -> list[Box] | None:
    boxes: list[Box] = []
    width = canvas[0] - side - GAP
    height = canvas[1] - side - GAP
    for _ in range(count):
        for _ in range(_ATTEMPTS):
            x = GAP + rng.random() * (width - GAP)
            y = GAP + rng.random() * (height - GAP)
            if all(max(abs(x - left), abs(y - top)) >= side + GAP for left, top, _ in boxes):
                boxes.append((x, y, side))
                break
        else:
            return None
    return boxes
