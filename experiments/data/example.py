"""What a data set promises: the same captioned item at any resolution, chosen by numbers alone."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SPLITS = ("train", "held_out")
NAMED = 10  # of the records that are skipped, so many are named in the log; all are counted

Size = int | tuple[int, int]
"""In pixels: the side of a square, or (height, width)."""

_log = logging.getLogger(__name__)


class DataError(ValueError):
    """The data cannot be used as asked; the message says why and what to do."""


class BadRecord(DataError):
    """One record cannot be used; the message is the reason. Readers skip it, count it and log it."""


@dataclass(frozen=True)
class Example:
    """One captioned image: `image` is (3, h, w) float32 in [-1, 1]."""

    image: Tensor
    caption: str
    key: str


class CaptionedImages(Protocol):
    """A data set. `example(i, size, variation)` is a pure function of its three numbers.

    The same (index, variation) at two sizes shows the same scene at two resolutions, so the
    truth at a resolution never trained on is at hand.
    """

    def __len__(self) -> int: ...

    def example(self, index: int, size: Size, variation: int = 0) -> Example: ...


class Record(Protocol):
    """An item of a data set, not drawn yet."""

    @property
    def key(self) -> str:
        """Its name; what decides its split."""

    def example(self, size: Size, variation: int = 0) -> Example:
        """Draw it; `BadRecord` where it cannot be used."""


class Records(Protocol):
    """What is read once, in order, and may have no length: a data set or a stream. A cache is built from it."""

    @property
    def name(self) -> str:
        """What it is, for messages, and to tell it from other data."""

    def records(self, seed: int = 0) -> Iterator[Record]:
        """All records, in an order that never changes; `seed` decides it where the set can be read in any order."""


class RandomAccess(ABC):
    """Captioned images that are `Records`, too."""

    name: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def example(self, index: int, size: Size, variation: int = 0) -> Example:
        """See `CaptionedImages`."""

    @abstractmethod
    def key(self, index: int) -> str:
        """The name of an item; what decides its split."""

    def record(self, index: int) -> Record:
        """An item, not drawn yet."""
        return _Item(self, index)

    def records(self, seed: int = 0) -> Iterator[Record]:
        """All items, shuffled by `seed`."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return map(self.record, order.tolist())


@dataclass(frozen=True)
class _Item:
    data: RandomAccess
    index: int

    @property
    def key(self) -> str:
        return self.data.key(self.index)

    def example(self, size: Size, variation: int = 0) -> Example:
        return self.data.example(self.index, size, variation)


class Skipped(Counter[str]):
    """Reason -> how many records were skipped for it; `NAMED` of them are named in the log."""

    def add(self, record: str, reason: object) -> None:
        """Count one, and log it."""
        self[str(reason)] += 1
        if self.total() <= NAMED:
            _log.warning("Skipped %s: %s", record, reason)

    def log_summary(self, source: str, used: int) -> None:
        """Log how many there were, if any."""
        if self:
            reasons = ", ".join(f"{count} × {reason}" for reason, count in self.most_common())
            _log.warning("%s: %d used, %d skipped (%s)", source, used, self.total(), reasons)


def caption_of(value: object) -> str:
    """A record's caption.

    Raises:
        BadRecord: it is none.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRecord("no caption")
    if not isinstance(value, str):
        raise BadRecord(f"its caption is no text ({type(value).__name__})")
    return value.strip()


def batch(
    data: CaptionedImages, indices: Sequence[int], size: Size, variations: Sequence[int]
) -> tuple[Tensor, list[str]]:
    """Stack examples: images (b, 3, h, w) in [-1, 1] and their captions."""
    examples = [data.example(i, size, v) for i, v in zip(indices, variations, strict=True)]
    return torch.stack([e.image for e in examples]), [e.caption for e in examples]


def in_split(key: str, split: str) -> bool:
    """Whether the item named `key` is in `split`: one key in ten is held out, by hash, for ever the same."""
    if split not in SPLITS:
        raise DataError(f"Unknown split {split!r}: expected one of {', '.join(SPLITS)}.")
    held_out = hashlib.sha256(key.encode()).digest()[0] < 26
    return held_out == (split == "held_out")


def extent(size: Size) -> tuple[int, int]:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else size


def photograph(image: Image.Image, size: Size, variation: int = 0) -> Tensor:
    """A picture (3, h, w) in [-1, 1]: the center, cropped to the shape and resized; odd variations are mirrored."""
    height, width = extent(size)
    scale = min(image.height / height, image.width / width)
    tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
    left, top = (image.width - wide) // 2, (image.height - tall) // 2
    cropped = image.convert("RGB").crop((left, top, left + wide, top + tall))
    pixels = np.asarray(cropped.resize((width, height), Image.Resampling.LANCZOS))
    return to_tensor(pixels[:, ::-1].copy() if variation % 2 else pixels)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 pixels (h, w, 3) -> float32 (3, h, w) in [-1, 1]."""
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
