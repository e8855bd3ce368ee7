"""Which images predictions are compared on: of which split, in which rendering, and a hash of what they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.config import EvaluationConfig
from experiments.core.files import folder_state
from experiments.data import DataError, Size, batch, open_dataset
from experiments.data.example import EVALUATION_VARIATION, content_digest
from experiments.distill.context import DistillationContext

Split = Literal["held_out", "held_in", "other"]
HELD_IN_VARIATION = EVALUATION_VARIATION + 2
"""Variation of held-in images: their objects are trained on, the very same rendering is not."""


@dataclass(frozen=True)
class ComparedImages:
    """Images of a data set, none of them twice.

    Attributes:
        data: the data set.
        indices: which of its images, in order.
        variation: of all of them.
    """

    data: Any
    indices: tuple[int, ...]
    variation: int = 0

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, size: Size, count: int) -> Iterator[tuple[Tensor, list[str]]]:
        """Iterate over images (b, 3, h, w) in [-1, 1] and their captions, `count` at a time."""
        for start in range(0, len(self), count):
            part = self.indices[start : start + count]
            yield batch(self.data, part, size, [self.variation] * len(part))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content of all images and captions, in order."""
        return content_digest(*(self.data.digest(index) for index in self.indices))


def compared_images(context: DistillationContext, data: str, split: Split, plan: EvaluationConfig) -> ComparedImages:
    """Select the images of a split: as many as the plan says, or all if the data has fewer.

    Held-out images are spread evenly over their split. Held-in images are the first that training encoded.

    Args:
        context: the held-out images, and how many images training encoded.
        data: as in a grid; held-in images come from its training split, "other" ones from its held-out split.
        split: "held_out" of the context's own data, "held_in", or "other": held-out, but not of the context's data.
        plan: how many images.

    Raises:
        DataError: the data cannot be read, or it has too few images for splits of their own.
    """
    dataset: Any
    if split == "held_in":
        dataset = _open_split(data, "train", folder_state(data.partition("#")[0]))
        encoded = encoded_indices(len(dataset), len(context.encoded))
        indices = list(dict.fromkeys(encoded))[: plan.held_in_images]
        return ComparedImages(dataset, tuple(indices), HELD_IN_VARIATION)
    dataset = context.held_out
    if split == "other":
        dataset = _open_split(data, "held_out", folder_state(data.partition("#")[0]))
    if getattr(dataset, "splits_overlap", False):
        raise DataError(
            f"Cannot evaluate on held-out images of {dataset.name}: {len(dataset)} images are too few for a split of "
            "their own, so that the same ones are trained on. Add images, one in ten of which is held out by the hash "
            "of its name, or give other data."
        )
    return ComparedImages(dataset, tuple(_spread_evenly(len(dataset), plan.images)))


def encoded_indices(length: int, images: int) -> list[int]:
    """Return which items of a training split of `length` items `encode_images` draws, in its order, with repeats."""
    return torch.randint(0, length, (images,), generator=torch.Generator().manual_seed(0)).tolist()


def _spread_evenly(length: int, count: int) -> list[int]:
    if count >= length:
        return list(range(length))
    return torch.linspace(0, length - 1, count).long().unique().tolist()


@lru_cache(maxsize=2)
def _open_split(data: str, split: str, state: str) -> Any:
    """Open a split once while its files stay as they are; opening a folder decodes every image."""
    return open_dataset(data, split=split)
