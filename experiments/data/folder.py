"""A folder of captioned images: bring your own data."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from experiments.data.example import (
    BadRecord,
    DataError,
    Example,
    RandomAccess,
    Size,
    caption_of,
    in_split,
    photograph,
)

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_log = logging.getLogger(__name__)


class ImageFolder(RandomAccess):
    """Images with captions, in the Hub's imagefolder convention.

    Captions come from `metadata.jsonl` (lines with `file_name` and `text`) where there is one,
    else from a text file beside each image (`cat.png`, `cat.txt`). Images are turned upright (EXIF),
    cropped to their center and resized; odd `variation`s are mirrored left to right.
    Images that cannot be read or have no caption, and damaged lines, are named in the log, counted in `skipped` and
    left out. Opening verifies every file once.

    Raises:
        DataError: not a folder, or no usable image in it.
    """

    def __init__(self, path: str | Path, split: str | None = None) -> None:
        self.path = Path(path)
        self.name = ", ".join([self.path.name, *([split] if split else [])])
        if not self.path.is_dir():
            raise DataError(
                f"Cannot open {self.path} as data: it is not a folder. Give a folder of images, 'emoji', .parquet, "
                ".arrow or .tar files (one, a folder of them, a glob), a saved data set's directory, or "
                "'hub:owner/name'."
            )
        self.skipped: dict[str, str] = {}
        self.items: list[tuple[Path, str]] = []
        for name, read in self._candidates():
            try:
                image, caption = read()
                _upright(image)
                self.items.append((image, caption_of(caption)))
            except BadRecord as error:
                self.skipped[name] = str(error)
                _log.warning("Skipped %s in %s: %s", name, self.path, error)
        if self.skipped:
            _log.warning("%s: %d images used, %d skipped", self.path, len(self.items), len(self.skipped))
        if not self.items:
            raise DataError(
                f"No usable image in {self.path} ({len(self.skipped)} skipped). Expected images "
                f"({', '.join(sorted(_SUFFIXES))}) with captions in metadata.jsonl or in .txt files beside them."
            )
        if split is not None:
            self._take(split)

    def _take(self, split: str) -> None:
        chosen = [item for item in self.items if in_split(item[0].name, split)]
        # With a handful of images the hash may leave a split empty; using all of them is honest and is logged.
        if not chosen:
            _log.warning("%s: too few images for the split %r, using all %d", self.path, split, len(self.items))
        self.items = chosen or self.items

    def _candidates(self) -> Iterator[tuple[str, Callable[[], tuple[Path, Any]]]]:
        """What there may be to use: its name in the log, and how its image's path and its caption are read."""
        metadata = self.path / "metadata.jsonl"
        if metadata.is_file():
            for number, line in enumerate(metadata.read_bytes().splitlines(), start=1):
                if line.strip():
                    yield f"metadata.jsonl, line {number}", partial(self._record, line)
            return
        for image in sorted(p for p in self.path.rglob("*") if p.suffix.lower() in _SUFFIXES):
            yield image.name, partial(_beside, image)

    def _record(self, line: bytes) -> tuple[Path, Any]:
        try:
            record = json.loads(line)
            return self.path / record["file_name"], record.get("text")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadRecord(f'expected {{"file_name": …, "text": …}}, got {line[:80]!r}') from error

    def __len__(self) -> int:
        return len(self.items)

    def key(self, index: int) -> str:
        """Its file's name."""
        return self.items[index][0].name

    def example(self, index: int, size: Size, variation: int = 0) -> Example:
        """Item `index` at a size; odd variations are mirrored."""
        path, caption = self.items[index]
        return Example(photograph(_upright(path), size, variation), caption, path.name)


def _upright(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except Exception as error:  # PIL's readers of damaged files raise whatever they come across
        raise BadRecord(f"cannot be read ({type(error).__name__})") from error


def _beside(image: Path) -> tuple[Path, str]:
    text = image.with_suffix(".txt")
    try:
        return image, text.read_text(encoding="utf-8").strip() if text.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise BadRecord(f"its caption {text.name} cannot be read ({type(error).__name__})") from error
