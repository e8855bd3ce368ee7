"""Building a latent cache, shard by shard; see `cache` for its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from experiments.core.files import sha256_of_file
from experiments.core.locks import lock_folder
from experiments.core.progress import ProgressCallback, ignore_progress
from experiments.data import BadRecord, DataError, DataRecord, Example, RecordSource, Size, extent
from experiments.data.example import SkipCounter, digest_records
from experiments.distill.cache import LatentCache
from experiments.distill.cache_index import (
    BLANK,
    BUILDING,
    FORMAT,
    INDEX,
    CacheError,
    CacheIndex,
    require_same_contents,
)
from experiments.teacher.teacher import Batch, Teacher
from unet_adapters.files import save_tensors

SHARD = 1024
"""Images per file."""
_EXACT = {"time_ids", "text_mask", "text_t5_mask", "resolution", "aspect_ratio", "caption"}
"""Stored as they are, whatever the dtype."""


def build_cache(
    teacher: Teacher,
    data: RecordSource,
    directory: Path,
    *,
    sizes: Sequence[Size],
    images: int,
    seed: int = 0,
    variations: int = 1,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
    shard: int = SHARD,
    progress: ProgressCallback = ignore_progress,
) -> LatentCache:
    """Encode what is missing in `directory`, and open the cache.

    Killed and started again, it continues after the last complete shard and ends with the same files, byte for byte on
    one machine. On a finished cache it reads and verifies every file, and rebuilds those that are damaged or missing.
    Records that cannot be used are skipped, counted in the index and logged.

    Args:
        teacher: whose encoders are used.
        data: from `open_records`, or `open_dataset`.
        directory: created if it is missing.
        sizes: in pixels; every image is encoded at all of them.
        images: how many at most; fewer if the data has fewer.
        seed: of the order of records, if these can be read in any order.
        variations: images of each record, one after the other.
        batch_size: images encoded at a time; changes rounding only.
        dtype: of latents, text and pooled.
        shard: images per file.
        progress: called after each shard with the images so far and `images`.

    Raises:
        CacheError: the directory has a cache with other contents, which are named; a size is no multiple of the
            autoencoder's factor; or something encoded is not finite in `dtype`.
        ValueError: something is missing, and another process is encoding it.
        DataError: no usable record, or the data cannot be read to its end.
        OSError: the disk is full; complete shards are kept.
    """
    contents = _describe(teacher, data, sizes, images, seed, variations, dtype, shard)
    if (directory / INDEX).is_file() and (index := _existing(directory, contents)).complete:
        return LatentCache(directory, index)
    with lock_folder(directory, "encoding"):
        index = _existing(directory, contents)  # read again: another process may have completed it until now
        if not index.complete or not (directory / INDEX).is_file():
            _Builder(teacher, directory, index, batch_size).build(_images(data, seed, variations), progress)
        return LatentCache(directory, index)


class _Builder:
    def __init__(self, teacher: Teacher, directory: Path, index: CacheIndex, batch_size: int) -> None:
        self._teacher = teacher
        self._directory = directory
        self._index = index
        self._batch_size = batch_size
        self._sizes = [tuple(size) for size in index.contents["sizes"]]
        self._dtype: torch.dtype = getattr(torch, index.contents["dtype"])

    def build(self, images: Iterator[tuple[DataRecord, int]], progress: ProgressCallback) -> None:
        index = self._index
        length = index.contents["shard"]
        total = index.contents["images"]
        self._directory.mkdir(parents=True, exist_ok=True)
        index.write(self._directory / BUILDING)
        (self._directory / INDEX).unlink(missing_ok=True)
        if BLANK not in index.files:
            self._write(BLANK, self._stored(self._teacher.unconditional))
        position = 0
        for number in range(len(index.shards) if index.finished else -(-total // length)):
            start, read = (index.shards[number - 1][key] if number else 0 for key in ("stop", "read"))
            if start < number * length:
                break  # the data ended before
            if index.has(number):
                continue
            following = islice(images, read - position, None)
            entry = self._build_shard(number, start, read, min(length, total - start), following)
            if index.shards[number : number + 1] not in ([], [entry]):
                raise CacheError(
                    f"Cannot repair the cache {self._directory}: {index.contents['data']} has changed since."
                )
            position = entry["read"]
            index.shards[number : number + 1] = [entry]
            index.write(self._directory / BUILDING)
            progress("encode", entry["stop"], total)
        self._finish()

    def _build_shard(
        self, number: int, start: int, read: int, count: int, images: Iterator[tuple[DataRecord, int]]
    ) -> dict[str, Any]:
        skipped = SkipCounter()
        keys: list[str] = []

        def usable() -> Iterator[list[Example]]:
            nonlocal read
            for record, variation in images:
                read += 1
                try:
                    examples = [record.example(size, variation) for size in self._sizes]
                except BadRecord as error:
                    skipped.add(record.key, error)
                    continue
                keys.append(record.key)
                yield examples

        stream = usable()
        captions: list[str] = []
        parts = []
        while chunk := list(islice(stream, min(self._batch_size, count - len(captions)))):
            captions += [examples[0].caption for examples in chunk]
            by_size = (torch.stack([example.image for example in same]) for same in zip(*chunk, strict=True))
            parts.append([self._stored(self._teacher.encode_images(same)) for same in by_size])
        if captions:
            values = [_joined(list(same)) for same in zip(*parts, strict=True)] + [self._conditions(captions)]
            for name, tensors in zip(self._index.names(number), values, strict=True):
                self._write(name, tensors, start=start, stop=start + len(captions))
        return {
            "start": start,
            "stop": start + len(captions),
            "keys": _keys_digest(keys),
            "read": read,
            "skipped": dict(skipped),
        }

    def _conditions(self, captions: list[str]) -> Batch:
        """The conditions of different captions, each once, and which image has which."""
        different = list(dict.fromkeys(captions))
        positions = {caption: position for position, caption in enumerate(different)}
        chunks = [different[i : i + self._batch_size] for i in range(0, len(different), self._batch_size)]
        conditions = _joined([self._stored(self._teacher.conditions(chunk)) for chunk in chunks])
        return {**conditions, "caption": torch.tensor([positions[caption] for caption in captions])}

    def _stored(self, tensors: Batch) -> Batch:
        """The tensors as they are written: on the CPU, in the cache's dtype, finite."""
        stored = {n: t.detach().cpu() if n in _EXACT else t.detach().cpu().to(self._dtype) for n, t in tensors.items()}
        for name, tensor in stored.items():
            if not tensor.isfinite().all():
                raise CacheError(
                    f"Cannot cache {name}: some values are not finite in {self._index.contents['dtype']}. Encode and "
                    "store them in float32 or bfloat16."
                )
        return stored

    def _write(self, name: str, tensors: Batch, **more: int) -> None:
        """Write a file. Its header has a single entry, because safetensors keeps no order among several."""
        header = {"cache": json.dumps({"file": name, **more, **self._index.contents}, sort_keys=True)}
        save_tensors(self._directory / name, tensors, header)
        self._index.files[name] = str(sha256_of_file(self._directory / name))

    def _finish(self) -> None:
        index = self._index
        if not index.images:
            raise DataError(f"No usable record in {index.contents['data']}.")
        index.skipped.log_summary(index.contents["data"], index.images)
        index.finished = True
        index.files = dict(sorted(index.files.items()))
        index.write(self._directory / INDEX)
        (self._directory / BUILDING).unlink()


def _describe(
    teacher: Teacher,
    data: RecordSource,
    sizes: Sequence[Size],
    images: int,
    seed: int,
    variations: int,
    dtype: torch.dtype,
    shard: int,
) -> dict[str, Any]:
    factor = teacher.pipe.vae_scale_factor
    extents = list(dict.fromkeys(extent(size) for size in sizes))
    wrong = [f"{h}x{w}" for h, w in extents if min(h, w) < factor or h % factor or w % factor]
    if wrong or not extents:
        raise CacheError(f"Cannot encode at {', '.join(wrong) or 'no size'}: expected multiples of {factor} pixels.")
    if min(images, variations, shard) < 1:
        raise CacheError(f"Expected images, variations and shard of at least 1, got {images}, {variations}, {shard}.")
    return {
        "format": FORMAT,
        "teacher": teacher.encoder_fingerprint,
        "data": data.name,
        "records": digest_records(data, seed),
        "sizes": [list(size) for size in extents],
        "images": images,
        "seed": seed,
        "variations": variations,
        "dtype": str(dtype).removeprefix("torch."),
        "shard": shard,
    }


def _existing(directory: Path, contents: dict[str, Any]) -> CacheIndex:
    """The index of what exists with these contents, without damaged files; of a new cache, an empty one."""
    path = next((directory / name for name in (INDEX, BUILDING) if (directory / name).is_file()), None)
    if path is None:
        return CacheIndex(contents)
    index = CacheIndex.read(path)
    require_same_contents(directory, index.contents, contents)
    index.files = {n: digest for n, digest in index.files.items() if sha256_of_file(directory / n) == digest}
    return index


def _images(data: RecordSource, seed: int, variations: int) -> Iterator[tuple[DataRecord, int]]:
    return ((record, variation) for record in data.records(seed) for variation in range(variations))


def _keys_digest(keys: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def _joined(parts: list[Batch]) -> Batch:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
