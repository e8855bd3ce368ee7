"""What a data set promises: the same captioned item at any resolution, chosen by numbers alone."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mixers.suggest import unknown_name

SPLITS = ("train", "held_out")
MAX_LOGGED = 10
"""How many skipped records of a source are named in the log; all are counted."""

DIGEST_SIZE = 32
"""Pixels at which rendered items are compared."""
DIGEST_RECORDS = 1024
"""How many records represent a source's content."""

EVALUATION_VARIATION = 2**40
"""Variations from here on are for evaluations: trainings count theirs from 0. Even: photographs are not mirrored."""

Size = int | tuple[int, int]
"""In pixels: the side of a square, or (height, width)."""

_BYTE_ORDER_MARK = "\ufeff"
_log = logging.getLogger(__name__)


class DataError(ValueError):
    """The data cannot be used as requested; the message says why and what to do."""


class BadRecord(DataError):
    """One record cannot be used; the message is the reason. Readers skip it, count it and log it."""


@dataclass(frozen=True)
class Example:
    """One captioned image.

    Attributes:
        image: (3, h, w) float32 in [-1, 1].
        caption: its text.
        key: its name; decides its split.
    """

    image: Tensor
    caption: str
    key: str


class CaptionedImages(Protocol):
    """A data set. `example(i, size, variation)` is a pure function of its three numbers.

    The same (index, variation) at two sizes shows the same scene at two resolutions, so the ground truth is available
    at resolutions that were never trained on.
    """

    def __len__(self) -> int: ...

    def example(self, index: int, size: Size, variation: int = 0) -> Example: ...


class DataRecord(Protocol):
    """An item of a data set whose image is not decoded or rendered yet."""

    @property
    def key(self) -> str:
        """Its name; decides its split."""

    def example(self, size: Size, variation: int = 0) -> Example:
        """Decode or render it; raises BadRecord if it cannot be used."""

    def digest(self) -> str:
        """Return a hash of its content, caption included, whether or not it can be used."""


class RecordSource(Protocol):
    """Records that are read once, in order, perhaps without a length: a data set or a stream for a cache."""

    @property
    def name(self) -> str:
        """What it is, for messages, and to distinguish it from other data."""

    def records(self, seed: int = 0) -> Iterator[DataRecord]:
        """Iterate over all records in an order that never changes; `seed` decides it if any order is possible."""


class RandomAccess(ABC):
    """Captioned images in any order; also a `RecordSource`.

    Attributes:
        name: of the data and its split, for messages.
        splits_overlap: whether one split has no item, so that the other one's items stand in for it.
    """

    name: str
    splits_overlap: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def example(self, index: int, size: Size, variation: int = 0) -> Example:
        """See `CaptionedImages`."""

    @abstractmethod
    def key(self, index: int) -> str:
        """Return the name of an item; it decides its split."""

    def digest(self, index: int) -> str:
        """Return a hash of an item's content. By default the item is rendered; override it if that is slow."""
        example = self.example(index, DIGEST_SIZE)
        return content_digest(example.key, example.caption, example.image.numpy().tobytes())

    def record(self, index: int) -> DataRecord:
        """Return an item, not decoded or rendered yet."""
        return _IndexedRecord(self, index)

    def records(self, seed: int = 0) -> Iterator[DataRecord]:
        """Iterate over all items, shuffled by `seed`."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return map(self.record, order.tolist())


@dataclass(frozen=True)
class _IndexedRecord:
    data: RandomAccess
    index: int

    @property
    def key(self) -> str:
        return self.data.key(self.index)

    def example(self, size: Size, variation: int = 0) -> Example:
        return self.data.example(self.index, size, variation)

    def digest(self) -> str:
        return self.data.digest(self.index)


class SkipCounter(Counter[str]):
    """Reason -> how many records were skipped for it; the first MAX_LOGGED of them are named in the log."""

    def add(self, record: str, reason: object) -> None:
        """Count one record, and log it."""
        self[str(reason)] += 1
        if self.total() <= MAX_LOGGED:
            _log.warning("Skipped %s: %s", record, reason)

    def log_summary(self, source: str, used: int) -> None:
        """Log how many were used and skipped, if any were skipped."""
        if self:
            reasons = ", ".join(f"{count} × {reason}" for reason, count in self.most_common())
            _log.warning("%s: %d used, %d skipped (%s)", source, used, self.total(), reasons)


def parse_caption(value: object) -> str:
    """Return a record's caption without surrounding white space or a byte-order mark.

    Raises:
        BadRecord: it is missing, empty or no text.
    """
    if value is None:
        raise BadRecord("no caption")
    if not isinstance(value, str):
        raise BadRecord(f"its caption is no text ({type(value).__name__})")
    caption = value.strip().removeprefix(_BYTE_ORDER_MARK).strip()
    if not caption:
        raise BadRecord("no caption")
    try:
        caption.encode()
    except UnicodeEncodeError as error:  # a half of a pair of UTF-16, as "\ud800" in JSON
        raise BadRecord(f"its caption is no valid Unicode ({error.reason})") from error
    return caption


def batch(
    data: CaptionedImages, indices: Sequence[int], size: Size, variations: Sequence[int]
) -> tuple[Tensor, list[str]]:
    """Stack examples: images (b, 3, h, w) in [-1, 1] and their captions."""
    examples = [data.example(i, size, v) for i, v in zip(indices, variations, strict=True)]
    return torch.stack([e.image for e in examples]), [e.caption for e in examples]


def in_split(key: str, split: str) -> bool:
    """Return whether the item named `key` is in `split`: about one key in ten is held out, by its hash, forever.

    Raises:
        DataError: unknown split.
    """
    if split not in SPLITS:
        raise DataError(unknown_name("split", split, SPLITS))
    held_out = hashlib.sha256(key.encode()).digest()[0] < 26
    return held_out == (split == "held_out")


def content_digest(*parts: object) -> str:
    """Return the SHA-256 of the parts of an item: bytes as they are, everything else as text."""
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode()
        digest.update(f"{len(content)} ".encode() + content)
    return digest.hexdigest()


def digest_records(data: RecordSource, seed: int = 0, count: int | None = None) -> str:
    """Return a hash of the content of a source's first records, to notice that the data changed.

    Args:
        data: the source.
        seed: of the order of its records.
        count: how many records; None: DIGEST_RECORDS.
    """
    records = islice(data.records(seed), DIGEST_RECORDS if count is None else count)
    return content_digest(*(record.digest() for record in records))


def extent(size: Size) -> tuple[int, int]:
    """Return (height, width)."""
    return (size, size) if isinstance(size, int) else size


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 pixels (h, w, 3) -> float32 (3, h, w) in [-1, 1]."""
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
