"""Count the areas of one color in an image: a measure of whether it shows one object or many."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def count_areas(image: Image.Image, side: int = 128, colors: int = 3) -> int:
    """Count the areas of one color in an image that is reduced to `side` pixels and to `colors` of its own colors.

    Upscaling an image keeps the number; an image that repeats its objects has more, and noise has the most. An area
    counts if it is at least 3 pixels wide, so that the soft edge between two areas does not count as one.
    """
    small = image.convert("RGB").resize((side, side), Image.Resampling.BOX)
    color_index = torch.from_numpy(np.array(small.quantize(colors, Image.Quantize.MAXCOVERAGE)))
    masks = [_erode(color_index == color) for color in color_index.unique()]
    return sum(len(_label_components(mask).unique()) - 1 for mask in masks)


def _erode(mask: Tensor) -> Tensor:
    """Map (h, w) to (h + 2, w + 2), both bool: true where all nine pixels around are; the border is false."""
    return ~F.max_pool2d((~F.pad(mask, (2, 2, 2, 2))).float()[None], 3, 1)[0].bool()


def _label_components(mask: Tensor) -> Tensor:
    """Map a mask (h, w) to labels (h, w): one number per component of touching pixels, corners included; 0 outside."""
    labels = torch.arange(1.0, mask.numel() + 1).view(mask.shape) * mask
    while True:  # the largest number floods its component
        flooded = F.max_pool2d(labels[None], 3, 1, 1)[0] * mask
        if flooded.equal(labels):
            return labels
        labels = flooded
