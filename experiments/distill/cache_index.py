"""The files of a latent cache: their names, their index, and how each is verified."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.core.files import write_json
from experiments.data.example import SkipCounter

FORMAT = 2
INDEX = "index.json"
BUILDING = "building.json"
BLANK = "unconditional.safetensors"


class CacheError(ValueError):
    """The cache cannot be used as requested; the message says why and what to do."""


@dataclass
class CacheIndex:
    """What a cache was made of, and which of its files exist.

    Attributes:
        contents: the arguments that decide what is in it.
        shards: for each, the range of its images (`start`, `stop`), the SHA-256 of their records' keys (`keys`), how
            many images of the data were read up to its end, unusable ones included (`read`), and reason -> how many of
            these were skipped in it (`skipped`).
        files: name -> SHA-256.
        finished: whether nothing is missing.
    """

    contents: dict[str, Any]
    shards: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    finished: bool = False

    @property
    def images(self) -> int:
        """The number of images."""
        return self.shards[-1]["stop"] if self.shards else 0

    @property
    def skipped(self) -> SkipCounter:
        """Reason -> how many records were skipped, over all shards."""
        total = SkipCounter()
        for shard in self.shards:
            total.update(shard["skipped"])
        return total

    def has(self, number: int) -> bool:
        """Return whether a shard and its files exist; a shard without images, at the data's end, has no files."""
        if number >= len(self.shards):
            return False
        shard = self.shards[number]
        return shard["start"] == shard["stop"] or all(name in self.files for name in self.names(number))

    @property
    def complete(self) -> bool:
        """Whether every file of a finished cache exists."""
        return self.finished and BLANK in self.files and all(map(self.has, range(len(self.shards))))

    def names(self, number: int) -> list[str]:
        """Return the names of a shard's files."""
        return [*(latents_file(number, tuple(size)) for size in self.contents["sizes"]), text_file(number)]

    def write(self, path: Path) -> None:
        """Write the index as JSON with a checksum, atomically."""
        values = asdict(self)
        write_json(path, {**values, "sha256": _checksum(values)})

    @classmethod
    def read(cls, path: Path) -> CacheIndex:
        """Read an index.

        Raises:
            CacheError: it is damaged.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("sha256") != _checksum(values):
                raise ValueError("its checksum is wrong")
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CacheError(
                f"The cache {path.parent} is damaged: {path.name} cannot be read. Delete the directory and build again."
            ) from error


def require_same_contents(directory: Path, existing: dict[str, Any], requested: dict[str, Any]) -> None:
    """Raise if a cache does not have the requested contents.

    Raises:
        CacheError: the message names what differs.
    """
    names = [name for name in requested if existing.get(name) != requested[name]]
    if names:
        differences = "; ".join(
            f"{name}: has {_abbreviate(existing.get(name))}, requested {_abbreviate(requested[name])}" for name in names
        )
        raise CacheError(
            f"The cache {directory} has other contents: {differences}. Give another directory, or delete it."
        )


def _abbreviate(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:12]}…"  # a hash


def latents_file(number: int, size: tuple[int, ...]) -> str:
    """Return the name of the file with a shard's latents."""
    return f"latents-{size[0]}x{size[1]}-{number:05}.safetensors"


def text_file(number: int) -> str:
    """Return the name of the file with a shard's captions."""
    return f"text-{number:05}.safetensors"


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
