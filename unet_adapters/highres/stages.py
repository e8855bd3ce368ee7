"""The stages of progressive upscaling: each image has about twice the side of the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

ImageSize = tuple[int, int]
"""(height, width) in pixels."""

DEFAULT_STRENGTHS = (0.4, 0.3, 0.2, 0.1)
"""Strengths of the stages after the first, as in LinFusion's published examples."""


@dataclass(frozen=True)
class ProgressiveStage:
    """One image of a progressive generation.

    Attributes:
        size: (height, width) in pixels.
        strength: the share of the denoising schedule that the stage runs, above 0 and up to 1; 1 starts from noise.
    """

    size: ImageSize
    strength: float


def progressive_stages(
    size: ImageSize, base_size: int, multiple_of: int, strengths: Sequence[float] = DEFAULT_STRENGTHS
) -> tuple[ProgressiveStage, ...]:
    """Return the stages that lead to an image of `size`.

    The size is halved until the image has at most `base_size`² pixels; the stages go through these sizes in ascending
    order.

    Args:
        size: (height, width) of the final image in pixels.
        base_size: the side of the square images that the model was trained on, in pixels.
        multiple_of: the sides of every stage are multiples of this many pixels.
        strengths: of the second stage, the third stage, and so on; the last one also applies to all further stages.

    Raises:
        ValueError: If a side is not a multiple of `multiple_of`, or a strength is outside (0, 1].
    """
    check_size(size, multiple_of)
    if not strengths or not all(0 < strength <= 1 for strength in strengths):
        raise ValueError(f"Expected strengths above 0 and up to 1, one at least; got {tuple(strengths)}.")
    sizes = [size]
    while sizes[0][0] * sizes[0][1] > base_size * base_size and min(sizes[0]) >= 2 * multiple_of:
        sizes.insert(0, _half(sizes[0], multiple_of))
    later = [
        ProgressiveStage(larger, strengths[min(index, len(strengths) - 1)]) for index, larger in enumerate(sizes[1:])
    ]
    return (ProgressiveStage(sizes[0], 1.0), *later)


def enlarging_stages(
    size: ImageSize,
    image_size: ImageSize,
    base_size: int,
    multiple_of: int,
    strengths: Sequence[float] = DEFAULT_STRENGTHS,
) -> tuple[ProgressiveStage, ...]:
    """Return the stages that enlarge an existing image to `size`; the first one is the image itself.

    The first stage has the shape of `size` and at most as many pixels as the image. The others are those of
    `progressive_stages` that are larger than the image; for an image smaller than the first of them, that one is halved
    further, and these stages run with the first of `strengths`.

    Args:
        size: (height, width) of the final image in pixels.
        image_size: (height, width) of the image in pixels.
        base_size, multiple_of, strengths: as in `progressive_stages`.

    Raises:
        ValueError: As `progressive_stages`; or the image is not smaller than `size`, or too small to be enlarged.
    """
    base, *later = progressive_stages(size, base_size, multiple_of, strengths)
    stages = [replace(base, strength=strengths[0]), *later]
    while _pixels(half := _half(stages[0].size, multiple_of)) < _pixels(stages[0].size):
        stages.insert(0, replace(stages[0], size=half))
    larger = [stage for stage in stages if _pixels(stage.size) > _pixels(image_size)]
    if not larger:
        raise ValueError(
            f"The image already has {format_size(image_size)} pixels, at least as many as the requested "
            f"{format_size(size)}. Choose a larger size, or pass a strength to change the image."
        )
    if len(larger) == len(stages):
        raise ValueError(
            f"An image of {format_size(image_size)} pixels is too small for this model: expected as many pixels as "
            f"{format_size(stages[0].size)} or more. Resize the image first."
        )
    scale = (_pixels(image_size) / _pixels(size)) ** 0.5
    height, width = (max(multiple_of, int(side * scale / multiple_of + 1e-6) * multiple_of) for side in size)
    return (ProgressiveStage((height, width), 1.0), *larger)


def check_size(size: ImageSize, multiple_of: int) -> None:
    """Check that both sides are positive multiples of `multiple_of`.

    Raises:
        ValueError: If they are not; the message names the nearest valid size.
    """
    if any(side <= 0 or side % multiple_of for side in size):
        height, width = (max(multiple_of, round(side / multiple_of) * multiple_of) for side in size)
        raise ValueError(
            f"Cannot make an image of {format_size(size)} pixels: this model needs sides that are multiples of "
            f"{multiple_of}. The nearest size is {format_size((height, width))}."
        )


def format_size(size: ImageSize) -> str:
    """Format (height, width) as "width × height"."""
    return f"{size[1]} × {size[0]}"


def _pixels(size: ImageSize) -> int:
    return size[0] * size[1]


def _half(size: ImageSize, multiple_of: int) -> ImageSize:
    height, width = (max(multiple_of, round(side / 2 / multiple_of) * multiple_of) for side in size)
    return height, width
