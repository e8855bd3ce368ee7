"""Captioned images for distillation and evaluation, available at any resolution.

`open_dataset("emoji")` is the embedded Twemoji set; `open_dataset("path/to/folder")` is a
folder of your own images in the Hub's imagefolder convention.
"""

from experiments.data.emoji import EmojiSet
from experiments.data.example import CaptionedImages, DataError, Example, batch
from experiments.data.folder import ImageFolder

__all__ = ["CaptionedImages", "DataError", "EmojiSet", "Example", "ImageFolder", "batch", "open_dataset"]


def open_dataset(source: str, *, split: str = "train") -> CaptionedImages:
    """Open the embedded emoji set (`"emoji"`) or a folder of captioned images (any other string: its path).

    Args:
        source: `"emoji"`, or the path of a folder with images and captions.
        split: `"train"` or `"held_out"`; the same fixed, content-keyed split for both sources.

    Raises:
        DataError: the folder does not exist, has no readable captioned image, or the split is unknown.
    """
    return EmojiSet(split=split) if source == "emoji" else ImageFolder(source, split=split)
