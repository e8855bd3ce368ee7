"""True images and captions that generated images are compared with: which ones, in which order, at which size."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from experiments.config import EvaluationConfig
from experiments.data import batch, open_dataset
from experiments.data.example import EVALUATION_VARIATION, content_digest
from experiments.metrics.inputs.coco import CocoCaptions

COCO = "coco:"


class TrueImages:
    """Images drawn from a data set without replacement, or all of them if there are fewer.

    Attributes:
        data: the data set.
        indices: which of its images, in order.

    Args:
        data: the data set.
        count: of images.
        seed: selects them.
        skip: images that come before in the seed's order, so that two sets are disjoint.

    Raises:
        ValueError: fewer than two images.
    """

    def __init__(self, data: Any, count: int, seed: int, skip: int = 0) -> None:
        self.data = data
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        self.indices = order[skip : skip + count].tolist()
        if len(self.indices) < 2:
            raise ValueError(
                f"Distances between sets of images need at least two images: {data.name} has {len(self.indices)}."
            )

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, size: int, count: int) -> Iterator[tuple[Tensor, list[str]]]:
        """Iterate over images (b, 3, size, size) in uint8 and their captions, `count` at a time."""
        for start in range(0, len(self.indices), count):
            part = self.indices[start : start + count]
            images, captions = batch(self.data, part, size, [EVALUATION_VARIATION] * len(part))
            yield ((images + 1) * 127.5).round().to(torch.uint8), captions

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content of all images and captions, in order."""
        return content_digest(*(self.data.digest(index) for index in self.indices))


@lru_cache(maxsize=2)
def open_true_images(data: str, plan: EvaluationConfig) -> TrueImages:
    """Open the true images of an evaluation.

    Args:
        data: the grid's data set, used unless `plan.generated.data` names another.
        plan: how many images, and the seed that selects them.

    Raises:
        DataError: the data cannot be read.
        ValueError: there are fewer than two images.
    """
    return TrueImages(_open_source(data, plan), plan.generated.images, plan.seed)


def open_second_set(data: str, plan: EvaluationConfig) -> TrueImages | None:
    """Open as many other true images, for the distance between two sets of them; None if the data has too few."""
    source = _open_source(data, plan)
    count = plan.generated.images
    return TrueImages(source, count, plan.seed, skip=count) if len(source) >= 2 * count else None


def _open_source(data: str, plan: EvaluationConfig) -> Any:
    source = plan.generated.data or data
    return CocoCaptions(source.removeprefix(COCO)) if source.startswith(COCO) else open_dataset(source, split="train")
