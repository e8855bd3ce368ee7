"""Tables of captioned images, read by the library `datasets`: Parquet, Arrow, WebDataset tars, saved sets, the Hub.

    SOURCE[#image=COLUMN&text=COLUMN&key=COLUMN]

SOURCE is a file, a folder or a glob of .parquet, .arrow or .tar files, a directory that `save_to_disk` wrote, or
`hub:owner/name`. A saved set takes `split` as well; the Hub `split`, `config` and `revision`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from glob import escape, glob
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from PIL import Image

from experiments.data.example import (
    BadRecord,
    DataError,
    Example,
    RandomAccess,
    Record,
    Size,
    Skipped,
    caption_of,
    in_split,
    photograph,
)

_log = logging.getLogger(__name__)

HUB = "hub:"
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
IMAGES, TEXTS, KEYS = ("image", "jpg", "png", "jpeg", "webp"), ("text", "caption", "txt", "prompt"), ("__key__",)
_NAME = "Name the columns: SOURCE#image=COLUMN&text=COLUMN."


def is_table(source: str) -> bool:
    """Whether `source` is one of this module's."""
    path, _ = _parsed(source)
    return path.startswith(HUB) or _is_saved(path) or bool(_files(path)) or "*" in path


class TableImages(RandomAccess):
    """A table, row by row in any order: memory-mapped Arrow files, for which `datasets` copies Parquet and tars once.

    Opening reads the captions alone. Rows without a caption are left out; one whose image turns out to be broken is
    replaced by the next one, always the same. Both are counted in `skipped` and logged. Odd `variation`s are mirrored.
    Rows are split by their key: the column `key`, else a tar's `__key__`, else the caption.

    Raises:
        DataError: nothing to read there, no such column, an unknown option or split, no usable row; or `datasets` is
            not installed.
    """

    def __init__(self, source: str, split: str | None = None) -> None:
        self._table = _Table(source, stream=False)
        self.name = ", ".join([self._table.name, *([split] if split else [])])
        self.skipped = Skipped()
        columns, rows = self._table.columns, self._table.rows
        captions, self._keys = (list(rows[column]) for column in (columns["text"], columns["key"]))
        usable = []
        for number, caption in enumerate(captions):
            try:
                caption_of(caption)
                usable.append(number)
            except BadRecord as error:
                self.skipped.add(f"row {number}", error)
        chosen = [n for n in usable if split is None or in_split(str(self._keys[n]), split)]
        if usable and not chosen:
            _log.warning("%s: too few rows for the split %r, using all %d", self._table.name, split, len(usable))
        self._rows = chosen or usable
        self.skipped.log_summary(self.name, len(usable))
        if not usable:
            raise DataError(f"No usable row in {source}: none of {len(captions)} has a caption in {columns['text']!r}.")

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """What the row is split by."""
        return str(self._keys[self._rows[index]])

    def record(self, index: int) -> Record:
        """A row, which may turn out to be bad."""
        return _Row(self.key(index), lambda: self._table.rows[self._rows[index]], self._table)

    def example(self, index: int, size: Size, variation: int = 0) -> Example:
        """Row `index`, or the next good one."""
        for place in [*range(index, len(self)), *range(index)]:
            try:
                return self.record(place).example(size, variation)
            except BadRecord as error:
                self.skipped.add(f"row {self._rows[place]}", error)
        raise DataError(f"No usable row in {self.name}: {self.skipped.most_common(1)[0][0]}.")


class TableStream:
    """A table read from its start to its end, without a copy and without a length; `Records` for a cache.

    Raises:
        DataError: as `TableImages`, and in iteration where the files cannot be read on.
    """

    def __init__(self, source: str, split: str | None = None) -> None:
        self._table = _Table(source, stream=True)
        self._split = split
        self.name = ", ".join([self._table.name, *([split] if split else [])])
        if split is not None:
            in_split("", split)  # an unknown one is refused here

    def records(self, seed: int = 0) -> Iterator[Record]:
        """The rows in their files' order, whatever the seed."""
        columns, rows = self._table.columns, iter(self._table.rows)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # a damaged file: the decoders of Arrow, tar, … have errors of their own
                raise DataError(f"Cannot read on in {self.name}: {_told(error)}") from error
            key = str(row[columns["key"]])
            if self._split is None or in_split(key, self._split):
                yield _Row(key, partial(dict, row), self._table)


class _Table:
    """Rows as `datasets` opens them, images not decoded, and which columns are what."""

    def __init__(self, source: str, stream: bool) -> None:
        path, options = _parsed(source)
        datasets = _library()
        try:
            rows = _load(datasets, path, options, stream)
            names = rows.column_names or list(next(iter(rows)))
            self.columns = _columns(names, options, source)
            self.image = datasets.Image()
            rows = rows.select_columns(list(dict.fromkeys(self.columns.values())))
            self.rows = rows.cast_column(self.columns["image"], datasets.Image(decode=False))
        except DataError:
            raise
        except Exception as error:  # whatever the reader of the format, or the network, has to say
            raise DataError(f"Cannot open {source} as data: {_told(error)}") from error
        self.name = Path(path).name if not path.startswith(HUB) else path


@dataclass
class _Row:
    key: str
    read: Callable[[], Mapping[str, Any]]
    table: _Table

    def example(self, size: Size, variation: int = 0) -> Example:
        image, caption = self._usable
        return Example(photograph(image, size, variation), caption, self.key)

    @cached_property
    def _usable(self) -> tuple[Image.Image, str]:
        row, columns = self.read(), self.table.columns
        caption, image = caption_of(row[columns["text"]]), row[columns["image"]]
        if image is None:
            raise BadRecord("no image")
        try:
            return self.table.image.decode_example(image).convert("RGB"), caption
        except Exception as error:  # PIL's readers of damaged files raise whatever they come across
            raise BadRecord(f"its image cannot be read ({type(error).__name__})") from error


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "Reading tables of images needs the package datasets: pip install 'linear-token-mixers[data]'."
        ) from error
    return datasets


def _load(datasets: Any, path: str, options: dict[str, str], stream: bool) -> Any:
    split = options.get("split", "train")
    if path.startswith(HUB):
        config, revision = options.get("config"), options.get("revision")
        return datasets.load_dataset(
            path.removeprefix(HUB), name=config, revision=revision, split=split, streaming=stream
        )
    if _is_saved(path):
        saved = datasets.load_from_disk(path)
        chosen = saved[split] if isinstance(saved, dict) else saved
        return chosen.to_iterable_dataset() if stream else chosen
    files = _files(path)
    kinds = {BUILDERS[Path(file).suffix] for file in files}
    if len(kinds) != 1:
        raise DataError(
            f"Cannot open {path} as data: expected files of one kind of {', '.join(BUILDERS)}, got {len(kinds)} kinds."
        )
    (kind,) = kinds
    more = {"data_files": files, "split": "train", "streaming": stream}
    if kind == "webdataset":
        return _load_tars(datasets, options, more)
    return datasets.load_dataset(kind, **more)


def _load_tars(datasets: Any, options: dict[str, str], more: dict[str, Any]) -> Any:
    """Tars; the library guesses columns from the first five records, and refuses where one of these is incomplete."""
    if "image" in options and "text" in options:
        texts = ("__key__", options["text"], options.get("key", "__key__"))
        features = datasets.Features({name: datasets.Value("string") for name in texts})
        features[options["image"]] = datasets.Image(decode=False)
        return datasets.load_dataset("webdataset", features=features, **more)
    try:
        return datasets.load_dataset("webdataset", **more)
    except ValueError as error:
        raise DataError(
            f"Cannot open {more['data_files'][0]} as data: {error} If not all records have the same fields: {_NAME}"
        ) from error


def _columns(names: list[str], options: dict[str, str], source: str) -> dict[str, str]:
    """image, text and key: the column of each, as asked for, or the first that has one of the usual names."""
    usual = {"image": IMAGES, "text": TEXTS, "key": KEYS}
    found: dict[str, str] = {}
    for what, known in usual.items():
        candidates = [options[what]] if what in options else [*known, *([found["text"]] if what == "key" else [])]
        chosen = next((name for name in candidates if name in names), None)
        if chosen is None:
            raise DataError(
                f"Cannot open {source} as data: expected a column {' or '.join(candidates)}, got {', '.join(names)}. "
                f"{_NAME}"
            )
        found[what] = chosen
    return found


def _parsed(source: str) -> tuple[str, dict[str, str]]:
    """A source's path and options."""
    path, _, fragment = source.rpartition("#") if "=" in source.rpartition("#")[2] else (source, "", "")
    options = dict(parse_qsl(fragment))
    known = ["image", "text", "key"]
    if path.startswith(HUB) or _is_saved(path):
        known.append("split")
    if path.startswith(HUB):
        known += ["config", "revision"]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise DataError(f"Cannot open {source} as data: expected options among {', '.join(known)}, got {unknown[0]!r}.")
    return path, options


def _is_saved(path: str) -> bool:
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _files(path: str) -> list[str]:
    """The files of a table, in the order of their names."""
    found = [path] if Path(path).is_file() else glob(path if "*" in path else f"{escape(path)}/**", recursive=True)
    return sorted(f for f in found if Path(f).suffix in BUILDERS and Path(f).stem != "metadata")


def _told(error: Exception) -> str:
    """The first line of an error, or of the one that it hides."""
    origin = error.__cause__ or error
    return (str(origin).splitlines() or [type(origin).__name__])[0]
