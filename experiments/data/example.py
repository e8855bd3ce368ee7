"""What a data set promises: the same captioned item at any resolution, chosen by numbers alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

SPLITS = ("train", "held_out")


class DataError(ValueError):
    """The data cannot be used as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Example:
    """One captioned image: `image` is (3, size, size) float32 in [-1, 1]."""

    image: Tensor
    caption: str
    key: str


class CaptionedImages(Protocol):
    """A data set. `example(i, size, variation)` is a pure function of its three numbers.

    The same (index, variation) at two sizes shows the same scene at two resolutions, so the
    truth at a resolution never trained on is at hand.
    """

    def __len__(self) -> int: ...

    def example(self, index: int, size: int, variation: int = 0) -> Example: ...


def batch(
    data: CaptionedImages, indices: Sequence[int], size: int, variations: Sequence[int]
) -> tuple[Tensor, list[str]]:
    """Stack examples: images (b, 3, size, size) in [-1, 1] and their captions."""
    examples = [data.example(i, size, v) for i, v in zip(indices, variations, strict=True)]
    return torch.stack([e.image for e in examples]), [e.caption for e in examples]


def in_split(key: str, split: str) -> bool:
    """Whether the item named `key` is in `split`: one key in ten is held out, by hash, for ever the same."""
    if split not in SPLITS:
        raise DataError(f"Unknown split {split!r}: expected one of {', '.join(SPLITS)}.")
    held_out = hashlib.sha256(key.encode()).digest()[0] < 26
    return held_out == (split == "held_out")


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 pixels (h, w, 3) -> float32 (3, h, w) in [-1, 1]."""
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
