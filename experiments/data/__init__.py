"""Captioned images for distillation and evaluation, available at any resolution.

`open_dataset("emoji")` is the embedded Twemoji set; `open_dataset("path/to/folder")` is a folder of your own images in
the Hub's imagefolder convention; Parquet, Arrow and tar files, saved sets and `"hub:owner/name"` are tables, see `hub`.
"""

from collections.abc import Callable
from typing import TypeVar

from experiments.data.emoji import EmojiSet
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

__all__ = [
    "BadRecord",
    "CaptionedImages",
    "DataError",
    "DataRecord",
    "EmojiSet",
    "Example",
    "ImageFolder",
    "RecordSource",
    "Size",
    "TableImages",
    "TableStream",
    "batch",
    "crop_and_resize",
    "extent",
    "open_dataset",
    "open_records",
    "read_image",
]

TableT = TypeVar("TableT", TableImages, TableStream)


def open_dataset(source: str, *, split: str = "train") -> EmojiSet | ImageFolder | TableImages:
    """Open captioned images that have a length and can be read in any order.

    Args:
        source: `"emoji"`; a folder of images; a file, a folder or a glob of .parquet, .arrow or .tar files; a directory
            written by `save_to_disk`; or `"hub:owner/name"`. Columns of tables: `SOURCE#image=COLUMN&text=COLUMN`.
        split: `"train"` or `"held_out"`; the same fixed, content-keyed split for all sources.

    Raises:
        DataError: there is no such source, it has no readable captioned image, or the split is unknown.
    """
    return _open(source, split, TableImages)


def open_records(source: str, *, split: str = "train") -> EmojiSet | ImageFolder | TableStream:
    """Open captioned images that are read once, in order, as a cache does: tables are streamed, without a copy on disk.

    Arguments and errors are those of `open_dataset`.
    """
    return _open(source, split, TableStream)


def _open(source: str, split: str, table: Callable[[str, str], TableT]) -> EmojiSet | ImageFolder | TableT:
    if source == "emoji":
        return EmojiSet(split=split)
    return table(source, split) if is_table(source) else ImageFolder(source, split=split)
