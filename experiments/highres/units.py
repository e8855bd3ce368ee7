"""Sizes and amounts of memory, as people write them."""

from __future__ import annotations

import re

from unet_adapters.highres.ladder import Size


def parse_size(text: str) -> Size:
    """ "WIDTHxHEIGHT" in pixels -> (height, width).

    Raises:
        ValueError: not two numbers.
    """
    found = re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\d+)\s*", text)
    if not found:
        raise ValueError(f"--size {text!r} is no size: expected width x height, as in 2048x1024.")
    return int(found[2]), int(found[1])


def parse_bytes(text: str) -> int:
    """ "24GB", "800 MiB" -> bytes; GB and GiB are both 2³⁰, as memory is sold.

    Raises:
        ValueError: not an amount of memory.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])i?B?\s*", text, re.IGNORECASE)
    if not found:
        raise ValueError(f"--memory {text!r} is no amount of memory: expected a number and a unit, as in 24GB.")
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2].upper()) + 1))
