"""Latents and conditions encoded once, on disk, in safetensors shards that are resumable and verified.

    latents-512x512-00000.safetensors   latents, and SDXL's time_ids, of up to 1,024 images at one size
    text-00000.safetensors              text, and SDXL's pooled, of their different captions, and which image has which
    unconditional.safetensors           the conditions of an empty caption
    index.json                          what everything was made of, and every file's SHA-256; written last

All sizes hold the same images in the same order, so what depends on captions is stored once. While a cache is being
built, its index is called building.json. `cache_builder` builds one; this module reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from experiments.core.files import sha256_of_file
from experiments.data import Size, extent
from experiments.distill.cache_index import (
    BLANK,
    BUILDING,
    FORMAT,
    INDEX,
    CacheError,
    CacheIndex,
    latents_file,
    require_same_contents,
    text_file,
)
from experiments.teacher.teacher import Batch, Teacher


def open_cache(directory: Path, teacher: Teacher | None = None, *, verify: bool = True) -> LatentCache:
    """Open a finished cache; nothing but its index is read.

    Args:
        directory: where `build_cache` has put it.
        teacher: refuse a cache that was made with other encoders than these.
        verify: compare each file's SHA-256 when it is first used, in each process: about a second per GB.

    Raises:
        CacheError: there is none, it is unfinished or damaged, or another teacher's.
    """
    if not (directory / INDEX).is_file():
        reason = "it is not finished" if (directory / BUILDING).is_file() else f"there is no {INDEX}"
        raise CacheError(
            f"Cannot open the cache {directory}: {reason}. Call build_cache, which continues where it stopped."
        )
    index = CacheIndex.read(directory / INDEX)
    requested: dict[str, Any] = {"format": FORMAT}
    if teacher is not None:
        requested["teacher"] = teacher.encoder_fingerprint
    require_same_contents(directory, index.contents, requested)
    return LatentCache(directory, index, verify)


class LatentCache:
    """Encoded images on disk, memory-mapped: a batch costs reading its rows. Files are opened when needed; picklable.

    Attributes:
        directory: of the cache.
        contents: the arguments that it was built with.
        sizes: (height, width) in pixels.
    """

    def __init__(self, directory: Path, index: CacheIndex, verify: bool = True) -> None:
        self.directory = directory
        self.contents = index.contents
        self.sizes: tuple[tuple[int, int], ...] = tuple((h, w) for h, w in index.contents["sizes"])
        self._index = index
        self._verify = verify
        self._files: dict[str, Batch] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __len__(self) -> int:
        return self._index.images

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> how many images were skipped for it."""
        return dict(self._index.skipped)

    @property
    def unconditional(self) -> Batch:
        """The conditions of an empty caption, of one sample: text (t, d), and pooled (p,); for caption dropout."""
        return self._read(BLANK)

    def batch(self, indices: Tensor | Sequence[int], size: Size | None = None) -> Batch:
        """Return images as `Teacher.encode` does, in the cache's dtype on the CPU.

        Args:
            indices: (b,), of the images.
            size: one of `sizes`; None: the first.

        Raises:
            CacheError: the size is not in the cache, or a file that is needed is damaged.
            IndexError: an index is not below the number of images.
        """
        requested = self.sizes[0] if size is None else extent(size)
        if requested not in self.sizes:
            available = ", ".join(f"{h}x{w}" for h, w in self.sizes)
            raise CacheError(
                f"The cache {self.directory} has no images of {requested[0]}x{requested[1]}: it has {available}."
            )
        rows = torch.as_tensor(indices, dtype=torch.int64)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise IndexError(f"Expected indices from 0 to {len(self) - 1}, got {int(rows.min())} to {int(rows.max())}.")
        length = self.contents["shard"]
        tensors: Batch = {}
        for number in (rows // length).unique().tolist():
            positions = (rows // length == number).nonzero().flatten()
            for name, values in self._rows(number, requested, rows[positions] - number * length).items():
                if name not in tensors:
                    tensors[name] = values.new_empty((len(rows), *values.shape[1:]))
                tensors[name][positions] = values
        return tensors

    def _rows(self, number: int, size: tuple[int, int], rows: Tensor) -> Batch:
        conditions = dict(self._read(text_file(number)))
        captions = conditions.pop("caption")[rows]
        images = self._read(latents_file(number, size))
        return {n: v[rows] for n, v in images.items()} | {n: v[captions] for n, v in conditions.items()}

    def _read(self, name: str) -> Batch:
        if name not in self._files:
            if self._verify and sha256_of_file(self.directory / name) != self._index.files.get(name):
                raise self._damaged(name)
            try:
                with safe_open(self.directory / name, "pt") as file:
                    self._files[name] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            except Exception as error:  # safetensors' own kinds, and the system's
                raise self._damaged(name) from error
        return self._files[name]

    def _damaged(self, name: str) -> CacheError:
        return CacheError(
            f"The cache {self.directory} is damaged: {name} is not the file that was written. Call build_cache with "
            "the arguments that built it; it rebuilds damaged files and only these."
        )
