"""True pictures and captions that samples are compared with: which, in which order, at which size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from experiments.config import EvaluationConfig
from experiments.data import batch, open_dataset
from experiments.evaluate.coco import CocoCaptions

VARIATION = 1000  # backgrounds and places that no training draws; photographs are not mirrored
COCO = "coco:"


class Reference:
    """`metrics.images` pictures of `metrics.data`, or all where there are fewer, drawn without replacement by the seed.

    Attributes:
        data: where they are from.
        indices: which.
    """

    def __init__(self, data: Any, count: int, seed: int) -> None:
        self.data = data
        self.indices = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        if len(self.indices) < 2:
            raise ValueError(f"Distances need two pictures at least: {data.name} has {len(self.indices)}.")

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, size: int, count: int) -> Iterator[tuple[Tensor, list[str]]]:
        """Pictures (b, 3, size, size), uint8, and their captions, `count` at a time."""
        for start in range(0, len(self.indices), count):
            part = self.indices[start : start + count]
            pictures, captions = batch(self.data, part, size, [VARIATION] * len(part))
            yield ((pictures + 1) * 127.5).round().to(torch.uint8), captions

    @property
    def digest(self) -> str:
        """The SHA-256 of the pictures' names, in order."""
        return hashlib.sha256("\n".join(self.data.key(i) for i in self.indices).encode()).hexdigest()


@lru_cache(maxsize=2)
def open_reference(data: str, plan: EvaluationConfig) -> Reference:
    """The true pictures of an evaluation whose grid uses `data`.

    Raises:
        DataError, ValueError: there are none, or too few.
    """
    source = plan.metrics.data or data
    coco = source.startswith(COCO)
    pictures = CocoCaptions(source.removeprefix(COCO)) if coco else open_dataset(source, split="train")
    return Reference(pictures, plan.metrics.images, plan.seed)
