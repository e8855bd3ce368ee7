"""The sizes on the way to a large image: each about twice the one before, the last the one that is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Size = tuple[int, int]
"""(height, width) in pixels."""

STRENGTHS = (0.4, 0.3, 0.2, 0.1)
"""How much of the schedule each stage after the first runs again (the published schedule of LinFusion's examples)."""


@dataclass(frozen=True)
class Stage:
    """One image on the way.

    Attributes:
        size: (height, width) in pixels.
        strength: the share of the denoising schedule that it runs: 1 starts from noise.
    """

    size: Size
    strength: float


def ladder(size: Size, base: int, unit: int, strengths: Sequence[float] = STRENGTHS) -> tuple[Stage, ...]:
    """The stages to an image of `size`: halved until its sides are those of `base`² pixels or fewer, then back.

    Args:
        size: (height, width) wanted, in pixels.
        base: the side of a square image that the model was trained on.
        unit: sides of every stage are multiples of this.
        strengths: of the second stage, the third, …; the last one goes for all that follow.

    Raises:
        ValueError: sides that are not multiples of `unit`, or strengths outside 0 … 1.
    """
    check_size(size, unit)
    if not strengths or not all(0 < s <= 1 for s in strengths):
        raise ValueError(f"Expected strengths above 0 and up to 1, one at least; got {tuple(strengths)}.")
    sizes = [size]
    while sizes[0][0] * sizes[0][1] > base * base and min(sizes[0]) >= 2 * unit:
        sizes.insert(0, _half(sizes[0], unit))
    later = (strengths[min(i, len(strengths) - 1)] for i in range(len(sizes) - 1))
    return (Stage(sizes[0], 1.0), *(Stage(s, strength) for s, strength in zip(sizes[1:], later, strict=True)))


def check_size(size: Size, unit: int) -> None:
    """Refuse sides that a model cannot have.

    Raises:
        ValueError: a side that is not a positive multiple of `unit`; the message names the nearest that are.
    """
    if any(side <= 0 or side % unit for side in size):
        height, width = (max(unit, round(side / unit) * unit) for side in size)
        raise ValueError(
            f"An image of {shown(size)} pixels cannot be made: sides have to be multiples of {unit}; "
            f"{shown((height, width))} is the nearest."
        )


def shown(size: Size) -> str:
    """A size as people write it, the width first."""
    return f"{size[1]} × {size[0]}"


def _half(size: Size, unit: int) -> Size:
    height, width = (max(unit, round(side / 2 / unit) * unit) for side in size)
    return height, width
