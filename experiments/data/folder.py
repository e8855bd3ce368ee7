"""A folder of captioned images: bring your own data."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from experiments.data.example import DataError, Example, in_split, to_tensor

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_log = logging.getLogger(__name__)


class ImageFolder:
    """Images with captions, in the Hub's imagefolder convention.

    Captions come from `metadata.jsonl` (lines with `file_name` and `text`) where there is one,
    else from a text file beside each image (`cat.png`, `cat.txt`). Images are cropped to their
    central square and resized; `variation` mirrors odd ones left to right.
    Images that cannot be read or have no caption are named in the log, counted in `skipped` and
    left out. Opening verifies every file once.

    Raises:
        DataError: not a folder, malformed metadata, or no usable image in it.
    """

    def __init__(self, path: str | Path, split: str | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise DataError(
                f"Cannot open {self.path} as data: it is not a folder. Give a folder of images, or 'emoji'."
            )
        self.skipped: dict[str, str] = {}
        self.items: list[tuple[Path, str]] = []
        for image, caption in self._candidates():
            reason = _fault(image) if caption else "no caption"
            if reason:
                self.skipped[image.name] = reason
                _log.warning("Skipped %s: %s", image, reason)
            else:
                self.items.append((image, caption))
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

    def _candidates(self) -> Iterator[tuple[Path, str]]:
        metadata = self.path / "metadata.jsonl"
        if metadata.is_file():
            for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), start=1):
                if line.strip():
                    yield self._record(line, number)
            return
        for image in sorted(p for p in self.path.rglob("*") if p.suffix.lower() in _SUFFIXES):
            text = image.with_suffix(".txt")
            yield image, text.read_text(encoding="utf-8").strip() if text.is_file() else ""

    def _record(self, line: str, number: int) -> tuple[Path, str]:
        try:
            record = json.loads(line)
            return self.path / record["file_name"], str(record["text"]).strip()
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{self.path / 'metadata.jsonl'}, line {number}: "
                f'expected {{"file_name": …, "text": …}}, got {line[:80]!r}.'
            ) from error

    def __len__(self) -> int:
        return len(self.items)

    def example(self, index: int, size: int, variation: int = 0) -> Example:
        """Item `index` as a (3, size, size) image; odd variations are mirrored."""
        path, caption = self.items[index]
        with Image.open(path) as image:
            square = _central_square(image.convert("RGB")).resize((size, size), Image.Resampling.LANCZOS)
        pixels = np.asarray(square)
        return Example(to_tensor(pixels[:, ::-1].copy() if variation % 2 else pixels), caption, path.name)


def _central_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _fault(path: Path) -> str | None:
    """Why this image cannot be used, or None."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, UnidentifiedImageError, ValueError) as error:
        return f"cannot be read ({type(error).__name__})"
    return None
