"""What can be measured in an image of a scene without a network: its background and the number of its objects."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.data.emoji import BACKGROUNDS

_PALETTE = torch.tensor([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in BACKGROUNDS.values()]).float()
DIFFERENCE = 60.0
"""Distance from the background, in RGB of 0 … 255, from which on a pixel belongs to an object."""
SMALLEST_SHARE = 0.2
"""A component counts if it has at least this share of the largest one's area."""


def find_backgrounds(images: Tensor) -> list[str]:
    """Return the name of the background nearest to the most frequent border color of images (n, 3, s, s) in [-1, 1]."""
    pixels = (images + 1) * 127.5
    border = torch.cat([pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, :, 0], pixels[:, :, :, -1]], dim=-1)
    nearest = torch.cdist(border.permute(0, 2, 1).contiguous(), _PALETTE).argmin(-1)
    names = list(BACKGROUNDS)
    return [names[number] for number in torch.mode(nearest, dim=1).values.tolist()]


def background_accuracy(images: Tensor, captions: list[str]) -> float:
    """Return the share of images whose background is the one that the caption names at its end."""
    expected = [caption.rsplit(", ", 1)[1].removesuffix(" background") for caption in captions]
    matches = [a == b for a, b in zip(find_backgrounds(images), expected, strict=True)]
    return sum(matches) / len(matches)


def count_objects(image: Tensor, background: str) -> int:
    """Count connected objects in an image (3, s, s) in [-1, 1] on a background given by its name.

    Parts closer than 1 % of the side are one object; specks of less than a fifth of the largest are none.
    """
    color = _PALETTE[list(BACKGROUNDS).index(background)]
    mask = ((image + 1) * 127.5 - color[:, None, None]).square().sum(0).sqrt() > DIFFERENCE
    reach = image.shape[-1] // 128
    grown = F.max_pool2d(mask[None, None].float(), 2 * reach + 1, 1, reach)[0, 0] > 0
    labels = label_components(grown)
    areas = torch.bincount(labels[mask & (labels > 0)])[1:] if bool(mask.any()) else torch.zeros(0)
    return int((areas >= SMALLEST_SHARE * areas.max()).sum()) if len(areas) else 0


def label_components(mask: Tensor) -> Tensor:
    """Return the connected components (8 neighbors) of a mask (h, w): 0 outside, one positive number each inside."""
    height, width = mask.shape
    numbers = torch.arange(1, height * width + 1).view(height, width).float() * mask
    while True:
        spread = F.max_pool2d(numbers[None, None], 3, 1, 1)[0, 0] * mask
        if torch.equal(spread, numbers):
            return numbers.long()
        numbers = spread
