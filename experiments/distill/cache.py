"""Latents and conditions encoded once, on disk: safetensors shards that are resumable, checksummed and never stale.

    latents-512x512-00000.safetensors   latents, and SDXL's time_ids, of up to 1,024 pictures at one size
    text-00000.safetensors              text, and SDXL's pooled, of their different captions, and which is whose
    unconditional.safetensors           the conditions of no caption
    index.json                          what all was made of, and every file's SHA-256; written last

All sizes hold the same pictures in the same order, so what is made of captions is stored once. While a cache is being
built its index is called building.json.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from experiments.data import BadRecord, DataError, Example, Record, Records, Size, extent
from experiments.data.example import Skipped
from experiments.distill.shards import (
    BLANK,
    BUILDING,
    FORMAT,
    INDEX,
    CacheError,
    Index,
    digest,
    latents_file,
    refuse,
    text_file,
)
from experiments.teacher.teacher import Batch, Teacher

SHARD = 1024  # pictures a file
KNOWN_BY = 1024  # records at the data's start, whose keys tell it from other data
_EXACT = {"time_ids", "caption"}  # stored as they are, whatever the dtype

Report = Callable[[int, int], None]


def build_cache(
    teacher: Teacher,
    data: Records,
    directory: Path,
    *,
    sizes: Sequence[Size],
    images: int,
    seed: int = 0,
    variations: int = 1,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
    shard: int = SHARD,
    report: Report | None = None,
) -> Cache:
    """Encode what is not in `directory` yet, and open the cache.

    Killed and started again it goes on after the last whole shard, and ends with the same files, byte for byte on one
    machine. On a finished cache it reads and verifies every file, and makes those again that are damaged or missing.
    Records that cannot be used are skipped, counted in the index and logged. One process builds; others wait for it.

    Args:
        teacher: whose encoders are used.
        data: from `open_records`, or `open_dataset`.
        directory: made where it is missing.
        sizes: in pixels; every picture is encoded at all of them.
        images: pictures at most; fewer where the data ends before.
        seed: of the order of records, where these can be read in any order.
        variations: pictures of each record, one after the other.
        batch_size: pictures encoded at a time; changes rounding alone.
        dtype: of latents, text and pooled.
        shard: pictures a file.
        report: called after each shard as (pictures so far, `images`).

    Raises:
        CacheError: the directory has a cache of something else, which is named; a size is no multiple of the
            autoencoder's factor; or something encoded is not finite in `dtype`.
        DataError: no usable record, or the data cannot be read on.
    """
    plan = _plan(teacher, data, sizes, images, seed, variations, dtype, shard)
    index = _started(directory, plan)
    if not index.whole or not (directory / INDEX).is_file():
        _Builder(teacher, directory, index, batch_size).build(_pictures(data, seed, variations), report)
    return Cache(directory, index)


def open_cache(directory: Path, teacher: Teacher | None = None, *, verify: bool = True) -> Cache:
    """Open a finished cache; nothing but its index is read.

    Args:
        directory: where `build_cache` has put it.
        teacher: refuse a cache that was made with other encoders than these.
        verify: compare each file's SHA-256 when it is first used, in each process: a second per GB or so.

    Raises:
        CacheError: there is none, it is unfinished or damaged, or another teacher's.
    """
    if not (directory / INDEX).is_file():
        unfinished = (directory / BUILDING).is_file()
        found = "it is not finished" if unfinished else f"there is no {INDEX}"
        raise CacheError(
            f"Cannot open the cache {directory}: {found}. Call build_cache, which goes on where it stopped."
        )
    index = Index.read(directory / INDEX)
    asked = {"format": FORMAT} if teacher is None else {"format": FORMAT, "teacher": teacher.fingerprint}
    refuse(directory, index.plan, asked)
    return Cache(directory, index, verify)


class Cache:
    """Encoded pictures on disk, memory-mapped: a batch costs the reading of its rows. Opened lazily; can be pickled.

    Attributes:
        directory: where it is.
        plan: what it was made of.
        sizes: (height, width) in pixels.
    """

    def __init__(self, directory: Path, index: Index, verify: bool = True) -> None:
        self.directory, self.plan, self._index, self._verify = directory, index.plan, index, verify
        self.sizes: tuple[tuple[int, int], ...] = tuple((h, w) for h, w in index.plan["sizes"])
        self._files: dict[str, Batch] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __len__(self) -> int:
        return self._index.pictures

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> how many pictures were skipped for it."""
        return dict(self._index.skipped)

    @property
    def unconditional(self) -> Batch:
        """The conditions of no caption, of one sample: text (t, d), and pooled (p,); for caption dropout."""
        return self._file(BLANK)

    def batch(self, indices: Tensor | Sequence[int], size: Size | None = None) -> Batch:
        """Pictures (b,), all at one size, as `Teacher.encode` gives them, in the cache's dtype on the CPU.

        Args:
            size: one of `sizes`; None: the first.

        Raises:
            CacheError: the size is not in the cache, or a file that is needed is damaged.
            IndexError: an index is not below the number of pictures.
        """
        wanted = self.sizes[0] if size is None else extent(size)
        if wanted not in self.sizes:
            has = ", ".join(f"{h}x{w}" for h, w in self.sizes)
            raise CacheError(f"The cache {self.directory} has no pictures of {wanted[0]}x{wanted[1]}: it has {has}.")
        rows = torch.as_tensor(indices, dtype=torch.int64)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise IndexError(f"Expected indices from 0 to {len(self) - 1}, got {int(rows.min())} to {int(rows.max())}.")
        found: Batch = {}
        for number in (rows // self.plan["shard"]).unique().tolist():
            places = (rows // self.plan["shard"] == number).nonzero().flatten()
            for name, values in self._rows(number, wanted, rows[places] - number * self.plan["shard"]).items():
                if name not in found:
                    found[name] = values.new_empty((len(rows), *values.shape[1:]))
                found[name][places] = values
        return found

    def _rows(self, number: int, size: tuple[int, int], rows: Tensor) -> Batch:
        conditions = dict(self._file(text_file(number)))
        captions = conditions.pop("caption")[rows]
        pictures = self._file(latents_file(number, size))
        return {n: v[rows] for n, v in pictures.items()} | {n: v[captions] for n, v in conditions.items()}

    def _file(self, name: str) -> Batch:
        if name not in self._files:
            if self._verify and digest(self.directory / name) != self._index.files.get(name):
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
            "the arguments that made it; it makes damaged files again, and only these."
        )


class _Builder:
    def __init__(self, teacher: Teacher, directory: Path, index: Index, batch_size: int) -> None:
        self._teacher, self._directory, self._index, self._batch_size = teacher, directory, index, batch_size
        self._sizes = [tuple(size) for size in index.plan["sizes"]]
        self._dtype: torch.dtype = getattr(torch, index.plan["dtype"])

    def build(self, pictures: Iterator[tuple[Record, int]], report: Report | None) -> None:
        index, length, images = self._index, self._index.plan["shard"], self._index.plan["images"]
        self._directory.mkdir(parents=True, exist_ok=True)
        index.write(self._directory / BUILDING)
        (self._directory / INDEX).unlink(missing_ok=True)
        if BLANK not in index.files:
            self._write(BLANK, self._stored(self._teacher.unconditional))
        position = 0
        for number in range(len(index.shards) if index.finished else -(-images // length)):
            start, read = (index.shards[number - 1][key] if number else 0 for key in ("stop", "read"))
            if start < number * length:
                break  # the data ended before
            if index.has(number):
                continue
            ahead = islice(pictures, read - position, None)
            entry = self._shard(number, start, read, min(length, images - start), ahead)
            if index.shards[number : number + 1] not in ([], [entry]):
                raise CacheError(f"Cannot mend the cache {self._directory}: {index.plan['data']} has changed since.")
            position = entry["read"]
            index.shards[number : number + 1] = [entry]
            index.write(self._directory / BUILDING)
            if report:
                report(entry["stop"], images)
        self._finish()

    def _shard(self, number: int, start: int, read: int, count: int, pictures: Iterator[tuple[Record, int]]) -> Any:
        skipped, keys = Skipped(), list[str]()

        def good() -> Iterator[list[Example]]:
            nonlocal read
            for record, variation in pictures:
                read += 1
                try:
                    drawn = [record.example(size, variation) for size in self._sizes]
                except BadRecord as error:
                    skipped.add(record.key, error)
                    continue
                keys.append(record.key)
                yield drawn

        examples, captions, parts = good(), list[str](), []
        while chunk := list(islice(examples, min(self._batch_size, count - len(captions)))):
            captions += [drawn[0].caption for drawn in chunk]
            images = (torch.stack([example.image for example in same]) for same in zip(*chunk, strict=True))
            parts.append([self._stored(self._teacher.encode_images(same)) for same in images])
        if captions:
            values = [_joined(list(same)) for same in zip(*parts, strict=True)] + [self._conditions(captions)]
            for name, tensors in zip(self._index.names(number), values, strict=True):
                self._write(name, tensors, start=start, stop=start + len(captions))
        entry = {"start": start, "stop": start + len(captions), "keys": _keys_digest(keys)}
        return {**entry, "read": read, "skipped": dict(skipped)}

    def _conditions(self, captions: list[str]) -> Batch:
        """Of different captions, each once, and which picture has which."""
        different = list(dict.fromkeys(captions))
        places = {caption: place for place, caption in enumerate(different)}
        chunks = [different[i : i + self._batch_size] for i in range(0, len(different), self._batch_size)]
        found = _joined([self._stored(self._teacher.conditions(chunk)) for chunk in chunks])
        return {**found, "caption": torch.tensor([places[caption] for caption in captions])}

    def _stored(self, tensors: Batch) -> Batch:
        found = {n: t.detach().cpu() if n in _EXACT else t.detach().cpu().to(self._dtype) for n, t in tensors.items()}
        for name, tensor in found.items():
            if not tensor.isfinite().all():
                raise CacheError(
                    f"Cannot cache {name} that are not finite in {self._index.plan['dtype']}: encode and store them in "
                    "float32 or bfloat16."
                )
        return found

    def _write(self, name: str, tensors: Batch, **more: int) -> None:
        """Write a file whole or not at all; its header has one entry, as safetensors keeps no order of several."""
        header = {"cache": json.dumps({"file": name, **more, **self._index.plan}, sort_keys=True)}
        partial = self._directory / f"{name}.partial"
        save_file({key: value.contiguous() for key, value in tensors.items()}, partial, metadata=header)
        self._index.files[name] = str(digest(partial))
        os.replace(partial, self._directory / name)

    def _finish(self) -> None:
        index = self._index
        if not index.pictures:
            raise DataError(f"No usable record in {index.plan['data']}.")
        index.skipped.tell(index.plan["data"], index.pictures)
        index.finished, index.files = True, dict(sorted(index.files.items()))
        index.write(self._directory / INDEX)
        (self._directory / BUILDING).unlink()


def _plan(
    teacher: Teacher,
    data: Records,
    sizes: Sequence[Size],
    images: int,
    seed: int,
    variations: int,
    dtype: torch.dtype,
    shard: int,
) -> dict[str, Any]:
    factor, extents = teacher.pipe.vae_scale_factor, list(dict.fromkeys(extent(size) for size in sizes))
    wrong = [f"{h}x{w}" for h, w in extents if min(h, w) < factor or h % factor or w % factor]
    if wrong or not extents:
        raise CacheError(f"Cannot encode at {', '.join(wrong) or 'no size'}: expected multiples of {factor} pixels.")
    if min(images, variations, shard) < 1:
        raise CacheError(f"Expected images, variations and shard of at least 1, got {images}, {variations}, {shard}.")
    return {
        "format": FORMAT,
        "teacher": teacher.fingerprint,
        "data": data.name,
        "records": _keys_digest(record.key for record in islice(data.records(seed), KNOWN_BY)),
        "sizes": [list(size) for size in extents],
        "images": images,
        "seed": seed,
        "variations": variations,
        "dtype": str(dtype).removeprefix("torch."),
        "shard": shard,
    }


def _started(directory: Path, plan: dict[str, Any]) -> Index:
    """What is there of the plan, without files that are not whole; of a new cache, nothing."""
    path = next((directory / name for name in (INDEX, BUILDING) if (directory / name).is_file()), None)
    if path is None:
        return Index(plan)
    index = Index.read(path)
    refuse(directory, index.plan, plan)
    index.files = {name: known for name, known in index.files.items() if digest(directory / name) == known}
    return index


def _pictures(data: Records, seed: int, variations: int) -> Iterator[tuple[Record, int]]:
    return ((record, variation) for record in data.records(seed) for variation in range(variations))


def _keys_digest(keys: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def _joined(parts: list[Batch]) -> Batch:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
