"""Parse the options of `mixlab generate` and `mixlab plan`."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from experiments.data import BadRecord, read_image
from unet_adapters.highres.stages import ImageSize


def parse_size(text: str) -> ImageSize:
    """Parse "WIDTHxHEIGHT" into (height, width).

    Raises:
        ValueError: If the text is not two numbers.
    """
    match = re.fullmatch(r"\s*(\d{1,9})\s*[x×]\s*(\d{1,9})\s*", text)
    if not match:
        raise ValueError(f"--size {text!r} is not a size: expected width x height in pixels, such as 2048x1024.")
    return int(match[2]), int(match[1])


def parse_bytes(text: str) -> int:
    """Parse an amount of memory such as "24GB" or "800 MiB" into bytes; GB and GiB both mean 2³⁰.

    Raises:
        ValueError: If the text is not an amount of memory.
    """
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d*)?)\s*([KMGT])i?B?\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError(f"--memory {text!r} is not an amount of memory: expected a number and a unit, such as 24GB.")
    return int(float(match[1]) * 1024 ** ("KMGT".index(match[2].upper()) + 1))


def parse_strengths(text: str) -> tuple[float, ...]:
    """Parse numbers separated by commas, such as "0.4,0.3".

    Raises:
        ValueError: If the text contains something else.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--strengths {text!r}: expected numbers separated by commas, such as 0.4,0.3.") from None


def open_image(path: Path, option: str) -> Image.Image:
    """Read an image in RGB.

    Raises:
        ValueError: If it cannot be read; the message names the option.
    """
    try:
        return read_image(path)
    except BadRecord as error:
        raise ValueError(f"{option}: {error}.") from error
