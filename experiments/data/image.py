"""Reading image files: every mode, depth and orientation becomes upright 8-bit RGB, the same way everywhere.

16-bit gray            divided by 257, so that 65,535 becomes 255
16-bit RGB             the high bytes, as Pillow decodes it
transparency           composited on BACKGROUND, whether it is an alpha channel, a palette entry or a color key
palette, CMYK, YCbCr   converted
EXIF orientation       applied
several frames         the first one
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from experiments.core.errors import first_line
from experiments.data.example import BadRecord, Size, extent, to_tensor

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
"""The files of a folder that are read as images."""

OTHER_SUFFIXES = frozenset(
    {
        ".avif",
        ".gif",
        ".heic",
        ".heif",
        ".ico",
        ".jfif",
        ".jp2",
        ".jxl",
        ".ppm",
        ".psd",
        ".svg",
        ".tga",
        ".tif",
        ".tiff",
    }
)
"""The files of a folder that are images, but not read: they are reported."""

BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels: white."""

MAX_PIXELS = 2**30
"""The largest image that is read, 32,768 × 32,768 pixels; Pillow's own limit is below what this library can write."""

_limit_lock = threading.RLock()


def read_image(source: str | Path | IO[bytes]) -> Image.Image:
    """Read an image file as upright 8-bit RGB.

    Args:
        source: a path, or an open binary file.

    Raises:
        BadRecord: it is missing, damaged, larger than MAX_PIXELS, or has values of unknown range.
    """
    name = f"{source}" if isinstance(source, str | Path) else "the image"
    try:
        with large_images_allowed(), Image.open(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadRecord(f"{name} has {image.width} × {image.height} pixels, more than {MAX_PIXELS:,}")
            return to_rgb(image)
    except BadRecord:
        raise
    except Exception as error:  # Pillow's decoders raise all kinds of errors on damaged files
        raise BadRecord(f"{name} cannot be read as an image ({type(error).__name__}: {first_line(error)})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to upright 8-bit RGB, transparent pixels composited on BACKGROUND.

    Raises:
        BadRecord: the range of its values is unknown.
    """
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        upright = _to_8_bits(upright)
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (*BACKGROUND, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return upright.convert("RGB")


def crop_and_resize(image: Image.Image, size: Size, variation: int = 0) -> Tensor:
    """Crop the center of an RGB image to the shape of `size` and resize it (Lanczos).

    Args:
        image: as `read_image` returns it.
        size: in pixels.
        variation: odd ones are mirrored left to right.

    Returns:
        (3, h, w) in [-1, 1].
    """
    height, width = extent(size)
    scale = min(image.height / height, image.width / width)
    crop_height = max(1, round(height * scale))
    crop_width = max(1, round(width * scale))
    left = (image.width - crop_width) // 2
    top = (image.height - crop_height) // 2
    cropped = image.crop((left, top, left + crop_width, top + crop_height))
    pixels = np.asarray(cropped.resize((width, height), Image.Resampling.LANCZOS))
    return to_tensor(pixels[:, ::-1].copy() if variation % 2 else pixels)


@contextmanager
def large_images_allowed() -> Iterator[None]:
    """Switch Pillow's limit on the number of pixels off inside the block, for all threads."""
    with _limit_lock:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _to_8_bits(image: Image.Image) -> Image.Image:
    """A gray image with values of more than 8 bits: integers up to 65,535, or floating-point numbers from 0 to 1."""
    values = np.asarray(image)
    low = float(values.min())
    high = float(values.max())
    largest = 1.0 if image.mode == "F" else 65535.0
    if not 0 <= low <= high <= largest:
        raise BadRecord(
            f"its gray values of mode {image.mode} are from {low:g} to {high:g}; expected from 0 to {largest:g}"
        )
    return Image.fromarray(np.rint(values.astype(np.float64) * (255 / largest)).astype(np.uint8))
