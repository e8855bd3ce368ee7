"""What a latent cache has on disk: the names of its files, its index, and how each is checked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.ablation import store
from experiments.data.example import Skipped

FORMAT = 1
INDEX, BUILDING, BLANK = "index.json", "building.json", "unconditional.safetensors"


class CacheError(ValueError):
    """The cache cannot be used as asked; the message says why and what to do."""


@dataclass
class Index:
    """What a cache was made of, and what is there.

    Attributes:
        plan: the arguments that decide what is in it.
        shards: of each, its pictures' range (`start`, `stop`) and the SHA-256 of their records' keys (`keys`); how many
            pictures of the data were read up to its end, bad ones included (`read`); and reason -> how many of these
            were skipped in it (`skipped`).
        files: name -> SHA-256.
        finished: whether nothing is missing.
    """

    plan: dict[str, Any]
    shards: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    finished: bool = False

    @property
    def pictures(self) -> int:
        """How many there are."""
        return self.shards[-1]["stop"] if self.shards else 0

    @property
    def skipped(self) -> Skipped:
        """Of all shards."""
        total = Skipped()
        for shard in self.shards:
            total.update(shard["skipped"])
        return total

    def has(self, number: int) -> bool:
        """Whether a shard and its files are there; the data's end may have left one without pictures, and files."""
        if number >= len(self.shards):
            return False
        shard = self.shards[number]
        return shard["start"] == shard["stop"] or all(name in self.files for name in self.names(number))

    @property
    def whole(self) -> bool:
        """Whether every file of a finished cache is there."""
        return self.finished and BLANK in self.files and all(map(self.has, range(len(self.shards))))

    def names(self, number: int) -> list[str]:
        """A shard's files."""
        return [*(latents_file(number, tuple(size)) for size in self.plan["sizes"]), text_file(number)]

    def write(self, path: Path) -> None:
        """As JSON with a checksum, atomically."""
        values = asdict(self)
        store.write_json(path, {**values, "sha256": _checksum(values)})

    @classmethod
    def read(cls, path: Path) -> Index:
        """`CacheError` where it is damaged."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("sha256") != _checksum(values):
                raise ValueError("its checksum is wrong")
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CacheError(
                f"The cache {path.parent} is damaged: {path.name} cannot be read. Delete the directory and build again."
            ) from error


def refuse(directory: Path, has: dict[str, Any], asked: dict[str, Any]) -> None:
    """`CacheError` that names what differs of two plans."""
    different = [name for name in asked if has.get(name) != asked[name]]
    if different:
        told = "; ".join(f"{name}: has {_short(has.get(name))}, asked {_short(asked[name])}" for name in different)
        raise CacheError(f"The cache {directory} is of something else: {told}. Give another directory, or delete it.")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:12]}…"  # a hash


def latents_file(number: int, size: tuple[int, ...]) -> str:
    """The file of a shard's latents."""
    return f"latents-{size[0]}x{size[1]}-{number:05}.safetensors"


def text_file(number: int) -> str:
    """The file of a shard's captions."""
    return f"text-{number:05}.safetensors"


def digest(path: Path) -> str | None:
    """A file's SHA-256, or None where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
