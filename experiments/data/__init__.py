"""Captioned images for distillation and evaluation, available at any resolution.

`open_dataset("scenes")` is the embedded set of scenes of Twemoji drawings, `open_dataset("emoji")` has one drawing per
image; `open_dataset("path/to/folder")` is a folder of your own images in the Hub's imagefolder convention; Parquet,
Arrow and tar files, saved sets and `"hub:owner/name"` are tables, see `hub`.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from experiments.data.emoji import LICENSE, EmojiSet
from experiments.data.example import (
    BadRecord,
    CaptionedImages,
    DataError,
    DataRecord,
    Example,
    RecordSource,
    Size,
    batch,
    extent,
)
from experiments.data.folder import ImageFolder
from experiments.data.hub import TableImages, TableStream, is_table
from experiments.data.image import crop_and_resize, read_image
from experiments.data.scenes import SceneSet

__all__ = [
    "BadRecord",
    "CaptionedImages",
    "DataError",
    "DataRecord",
    "EmojiSet",
    "Example",
    "ImageFolder",
    "RecordSource",
    "SceneSet",
    "Size",
    "TableImages",
    "TableStream",
    "batch",
    "credit",
    "crop_and_resize",
    "extent",
    "open_dataset",
    "open_records",
    "read_image",
]

TableT = TypeVar("TableT", TableImages, TableStream)

EMBEDDED: dict[str, Callable[[str], EmojiSet | SceneSet]] = {
    "scenes": SceneSet,
    "scenes-more": partial(SceneSet, growth="more"),
    "emoji": EmojiSet,
}
"""Data sets that need no files: name -> function from the split to the data set."""


def credit(source: str) -> str:
    """Return what must accompany images of a data set, or of a model trained on it; "" if nothing is known."""
    return LICENSE if source in EMBEDDED else ""


def open_dataset(source: str, *, split: str = "train") -> EmojiSet | SceneSet | ImageFolder | TableImages:
    """Open captioned images that have a length and can be read in any order.

    Args:
        source: `"scenes"`; `"scenes-more"`; `"emoji"`; a folder of images; a file, a folder or a glob of .parquet,
            .arrow or .tar files; a directory written by `save_to_disk`; or `"hub:owner/name"`. Columns of tables:
            `SOURCE#image=COLUMN&text=COLUMN`.
        split: `"train"` or `"held_out"`; the same fixed, content-keyed split for all sources.

    Raises:
        DataError: there is no such source, it has no readable captioned image, or the split is unknown.
    """
    return _open(source, split, TableImages)


def open_records(source: str, *, split: str = "train") -> EmojiSet | SceneSet | ImageFolder | TableStream:
    """Open captioned images that are read once, in order, as a cache does: tables are streamed, without a copy on disk.

    Arguments and errors are those of `open_dataset`.
    """
    return _open(source, split, TableStream)


def _open(source: str, split: str, table: Callable[[str, str], TableT]) -> EmojiSet | SceneSet | ImageFolder | TableT:
    if source in EMBEDDED:
        return EMBEDDED[source](split)
    if not source.removeprefix("hub:").strip() or "\0" in source:
        raise DataError(f"Cannot open {source!r} as data: give 'scenes', a folder, tables or 'hub:owner/name'.")
    return table(source, split) if is_table(source) else ImageFolder(source, split=split)
