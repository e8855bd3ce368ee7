"""A folder of captioned images: bring your own data."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from experiments.data.example import (
    BadRecord,
    DataError,
    Example,
    RandomAccess,
    Size,
    content_digest,
    in_split,
    parse_caption,
)
from experiments.data.image import OTHER_SUFFIXES, SUFFIXES, crop_and_resize, read_image

METADATA = "metadata.jsonl"
TABLE_SUFFIXES = frozenset({".parquet", ".arrow", ".tar"})
_log = logging.getLogger(__name__)


def has_captioned_images(folder: Path) -> bool:
    """Return whether a folder follows the imagefolder convention: it has metadata.jsonl, or an image with a caption."""
    if (folder / METADATA).is_file():
        return True
    return any(path.suffix.lower() in SUFFIXES and path.with_suffix(".txt").is_file() for path in folder.rglob("*"))


class ImageFolder(RandomAccess):
    """Images with captions, in the Hub's imagefolder convention.

    Captions come from `metadata.jsonl` (lines with `file_name` and `text`) if there is one, otherwise from a text file
    beside each image (`cat.png`, `cat.txt`). Images are read as `read_image` does, cropped to their center and resized;
    odd `variation`s are mirrored left to right. Images that cannot be read or have no caption, image formats that are
    not read, stray tables and damaged lines are named in the log, counted in `skipped` and left out. Opening decodes
    every file once.

    Args:
        path: the folder.
        split: `"train"` or `"held_out"`, by the file's path inside the folder; None: everything.

    Raises:
        DataError: not a folder, or no usable image in it.
    """

    def __init__(self, path: str | Path, split: str | None = None) -> None:
        self.path = Path(path)
        self.name = ", ".join([self.path.name, *([split] if split else [])])
        if not self.path.is_dir():
            raise DataError(
                f"Cannot open {self.path} as data: it is not a folder. Give a folder of images, 'scenes', .parquet, "
                ".arrow or .tar files (one, a folder of them, a glob), a saved data set's directory, or "
                "'hub:owner/name'."
            )
        self.skipped: dict[str, str] = {}
        self.items: list[tuple[Path, str]] = []
        for name, read in self._candidates():
            try:
                image, caption = read()
                parsed = parse_caption(caption)
                read_image(image)
                self.items.append((image, parsed))
            except BadRecord as error:
                self.skipped[name] = str(error)
                _log.warning("Skipped %s in %s: %s", name, self.path, error)
        if self.skipped:
            _log.warning("%s: %d images used, %d skipped", self.path, len(self.items), len(self.skipped))
        if not self.items:
            raise DataError(
                f"No usable image in {self.path} ({len(self.skipped)} skipped). Expected images "
                f"({', '.join(sorted(SUFFIXES))}) with captions in {METADATA} or in .txt files beside them."
            )
        if split is not None:
            self._keep_split(split)

    def _keep_split(self, split: str) -> None:
        items = [item for item in self.items if in_split(self._name(item[0]), split)]
        if not items:  # with a handful of images the hash may leave a split empty
            _log.warning("%s: too few images for the split %r, using all %d", self.path, split, len(self.items))
        self.splits_overlap = len(items) in (0, len(self.items))
        self.items = items or self.items

    def _candidates(self) -> Iterator[tuple[str, Callable[[], tuple[Path, Any]]]]:
        """Yield what may be usable: its name in the log, and a function that returns its image's path and caption."""
        metadata = self.path / METADATA
        if metadata.is_file():
            for number, line in enumerate(metadata.read_bytes().splitlines(), start=1):
                if line.strip():
                    yield f"{METADATA}, line {number}", partial(self._parse_line, line)
            return
        for path in sorted(self.path.rglob("*")):
            suffix = path.suffix.lower()
            if suffix in SUFFIXES:
                yield self._name(path), partial(_with_caption_file, path)
            elif suffix in OTHER_SUFFIXES | TABLE_SUFFIXES:
                yield self._name(path), partial(_refuse, f"{suffix} files are not read from a folder of images")

    def _parse_line(self, line: bytes) -> tuple[Path, Any]:
        try:
            record = json.loads(line)
            return self.path / record["file_name"], record.get("text")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BadRecord(f'expected {{"file_name": …, "text": …}}, got {line[:80]!r}') from error

    def __len__(self) -> int:
        return len(self.items)

    def key(self, index: int) -> str:
        """Return its file's path inside the folder: sub-folders may hold files of the same name."""
        return self._name(self.items[index][0])

    def _name(self, path: Path) -> str:
        name = (path.relative_to(self.path) if path.is_relative_to(self.path) else path).as_posix()
        return os.fsencode(name).decode(errors="backslashreplace")  # names of files need not be text

    def digest(self, index: int) -> str:
        """Return a hash of the file and its caption."""
        path, caption = self.items[index]
        return content_digest(self._name(path), caption, path.read_bytes())

    def example(self, index: int, size: Size, variation: int = 0) -> Example:
        """Return item `index` at a size; odd variations are mirrored."""
        path, caption = self.items[index]
        return Example(crop_and_resize(read_image(path), size, variation), caption, self._name(path))


def _with_caption_file(image: Path) -> tuple[Path, str | None]:
    text = image.with_suffix(".txt")
    try:
        return image, text.read_text(encoding="utf-8-sig") if text.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise BadRecord(f"its caption {text.name} cannot be read ({type(error).__name__})") from error


def _refuse(reason: str) -> tuple[Path, str]:
    raise BadRecord(reason)
