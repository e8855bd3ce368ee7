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

from experiments.core.errors import first_line
from experiments.data.example import (
    BadRecord,
    DataError,
    DataRecord,
    Example,
    RandomAccess,
    Size,
    SkipCounter,
    content_digest,
    in_split,
    parse_caption,
)
from experiments.data.folder import has_captioned_images
from experiments.data.image import crop_and_resize, large_images_allowed, to_rgb

_log = logging.getLogger(__name__)

HUB = "hub:"
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
USUAL_COLUMNS = {
    "image": ("image", "jpg", "png", "jpeg", "webp"),
    "text": ("text", "caption", "txt", "prompt"),
    "key": ("__key__",),
}
"""The names under which a column is found if the source does not name it."""
_NAME_THE_COLUMNS = "Name the columns: SOURCE#image=COLUMN&text=COLUMN."


def is_table(source: str) -> bool:
    """Return whether `source` is a table; a folder of captioned images is none, whatever files are beside them."""
    path, _ = _parse_source(source)
    if path.startswith(HUB) or _is_saved(path) or "*" in path:
        return True
    return bool(_table_files(path)) and not has_captioned_images(Path(path))


class TableImages(RandomAccess):
    """A table in random access, from memory-mapped Arrow files; `datasets` copies Parquet and tars to such files once.

    Opening reads the captions only. Rows without a caption are left out; a row whose image turns out to be damaged is
    replaced by the next one, always the same. Both are counted in `skipped` and logged. Odd `variation`s are mirrored.
    Rows are split by their key: the column `key`, otherwise a tar's `__key__`, otherwise the caption.

    Args:
        source: see the module.
        split: `"train"` or `"held_out"`; None: everything.

    Raises:
        DataError: there is nothing to read, no such column, an unknown option or split, no usable row; or `datasets`
            is not installed.
    """

    def __init__(self, source: str, split: str | None = None) -> None:
        self._table = _Table(source, stream=False)
        self.name = ", ".join([self._table.name, *([split] if split else [])])
        self.skipped = SkipCounter()
        columns = self._table.columns
        captions = list(self._table.rows[columns["text"]])
        self._keys = list(self._table.rows[columns["key"]])
        usable = []
        for number, caption in enumerate(captions):
            try:
                parse_caption(caption)
                usable.append(number)
            except BadRecord as error:
                self.skipped.add(f"row {number}", error)
        selected = [n for n in usable if split is None or in_split(str(self._keys[n]), split)]
        if usable and not selected:
            _log.warning("%s: too few rows for the split %r, using all %d", self._table.name, split, len(usable))
        self.splits_overlap = split is not None and len(selected) in (0, len(usable))
        self._rows = selected or usable
        self.skipped.log_summary(self.name, len(usable))
        if not usable:
            raise DataError(f"No usable row in {source}: none of {len(captions)} has a caption in {columns['text']!r}.")

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """Return what the row is split by."""
        return str(self._keys[self._rows[index]])

    def record(self, index: int) -> DataRecord:
        """Return a row, which may turn out to be unusable."""
        return _Row(self.key(index), lambda: self._table.rows[self._rows[index]], self._table)

    def example(self, index: int, size: Size, variation: int = 0) -> Example:
        """Return row `index`, or the next usable one."""
        for candidate in [*range(index, len(self)), *range(index)]:
            try:
                return self.record(candidate).example(size, variation)
            except BadRecord as error:
                self.skipped.add(f"row {self._rows[candidate]}", error)
        raise DataError(f"No usable row in {self.name}: {self.skipped.most_common(1)[0][0]}.")


class TableStream:
    """A table read from start to end, without a copy and without a length; a `RecordSource` for a cache.

    Raises:
        DataError: as `TableImages`, and during iteration if the files cannot be read to their end.
    """

    def __init__(self, source: str, split: str | None = None) -> None:
        self._table = _Table(source, stream=True)
        self._split = split
        self.name = ", ".join([self._table.name, *([split] if split else [])])
        if split is not None:
            in_split("", split)  # refuses an unknown split

    def records(self, seed: int = 0) -> Iterator[DataRecord]:
        """Iterate over the rows in their files' order, whatever the seed."""
        rows = iter(self._table.rows)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the decoders of Arrow, tar and so on raise errors of their own
                raise DataError(f"Cannot read {self.name} to its end: {first_line(error)}") from error
            key = str(row[self._table.columns["key"]])
            if self._split is None or in_split(key, self._split):
                yield _Row(key, partial(dict, row), self._table)


class _Table:
    """Rows as `datasets` opens them, images not decoded, and the roles of their columns."""

    def __init__(self, source: str, stream: bool) -> None:
        path, options = _parse_source(source)
        datasets = _import_datasets()
        try:
            rows = _load(datasets, path, options, stream)
            names = rows.column_names or list(next(iter(rows)))
            self.columns = _assign_columns(names, options, source)
            self.image = datasets.Image()
            rows = rows.select_columns(list(dict.fromkeys(self.columns.values())))
            self.rows = rows.cast_column(self.columns["image"], datasets.Image(decode=False))
        except DataError:
            raise
        except Exception as error:  # of the format's reader, or of the network
            raise DataError(f"Cannot open {source} as data: {first_line(error)}") from error
        self.name = Path(path).name if not path.startswith(HUB) else path


@dataclass
class _Row:
    key: str
    read: Callable[[], Mapping[str, Any]]
    table: _Table

    def example(self, size: Size, variation: int = 0) -> Example:
        image, caption = self._usable
        return Example(crop_and_resize(image, size, variation), caption, self.key)

    def digest(self) -> str:
        row = self.read()
        image = row[self.table.columns["image"]] or {}
        return content_digest(self.key, row[self.table.columns["text"]], image.get("bytes"), image.get("path"))

    @cached_property
    def _usable(self) -> tuple[Image.Image, str]:
        row = self.read()
        caption = parse_caption(row[self.table.columns["text"]])
        image = row[self.table.columns["image"]]
        if image is None:
            raise BadRecord("no image")
        try:
            with large_images_allowed():
                return to_rgb(self.table.image.decode_example(image)), caption
        except BadRecord:
            raise
        except Exception as error:  # Pillow's decoders raise all kinds of errors on damaged files
            raise BadRecord(f"its image cannot be read ({type(error).__name__})") from error


def _import_datasets() -> Any:
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
        return datasets.load_dataset(
            path.removeprefix(HUB),
            name=options.get("config"),
            revision=options.get("revision"),
            split=split,
            streaming=stream,
        )
    if _is_saved(path):
        saved = datasets.load_from_disk(path)
        rows = saved[split] if isinstance(saved, dict) else saved
        return rows.to_iterable_dataset() if stream else rows
    files = _table_files(path)
    kinds = {BUILDERS[Path(file).suffix] for file in files}
    if len(kinds) != 1:
        raise DataError(
            f"Cannot open {path} as data: expected files of one kind of {', '.join(BUILDERS)}, got {len(kinds)} kinds."
        )
    (kind,) = kinds
    arguments = {"data_files": files, "split": "train", "streaming": stream}
    if kind == "webdataset":
        return _load_tars(datasets, options, arguments)
    return datasets.load_dataset(kind, **arguments)


def _load_tars(datasets: Any, options: dict[str, str], arguments: dict[str, Any]) -> Any:
    """Tars. Without named columns, the library infers them from the first five records and needs these complete."""
    if "image" in options and "text" in options:
        texts = ("__key__", options["text"], options.get("key", "__key__"))
        features = datasets.Features({name: datasets.Value("string") for name in texts})
        features[options["image"]] = datasets.Image(decode=False)
        return datasets.load_dataset("webdataset", features=features, **arguments)
    try:
        return datasets.load_dataset("webdataset", **arguments)
    except ValueError as error:
        raise DataError(
            f"Cannot open {arguments['data_files'][0]} as data: {error} If not all records have the same fields: "
            f"{_NAME_THE_COLUMNS}"
        ) from error


def _assign_columns(names: list[str], options: dict[str, str], source: str) -> dict[str, str]:
    """image, text and key -> the column that the source names for it, or the first that has a usual name."""
    columns: dict[str, str] = {}
    for role, usual in USUAL_COLUMNS.items():
        candidates = [options[role]] if role in options else list(usual)
        if role == "key" and role not in options:
            candidates.append(columns["text"])
        column = next((name for name in candidates if name in names), None)
        if column is None:
            raise DataError(
                f"Cannot open {source} as data: expected a column {' or '.join(candidates)}, got {', '.join(names)}. "
                f"{_NAME_THE_COLUMNS}"
            )
        columns[role] = column
    return columns


def _parse_source(source: str) -> tuple[str, dict[str, str]]:
    """Return a source's path and options."""
    path, _, fragment = source.rpartition("#") if "=" in source.rpartition("#")[2] else (source, "", "")
    options = dict(parse_qsl(fragment))
    allowed = ["image", "text", "key"]
    if path.startswith(HUB) or _is_saved(path):
        allowed.append("split")
    if path.startswith(HUB):
        allowed += ["config", "revision"]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise DataError(
            f"Cannot open {source} as data: expected options among {', '.join(allowed)}, got {unknown[0]!r}."
        )
    return path, options


def _is_saved(path: str) -> bool:
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _table_files(path: str) -> list[str]:
    """Return the files of a table, in the order of their names."""
    files = [path] if Path(path).is_file() else glob(path if "*" in path else f"{escape(path)}/**", recursive=True)
    return sorted(f for f in files if Path(f).suffix in BUILDERS and Path(f).stem != "metadata")
