"""A teacher and its training data, opened once and shared by the cells of a grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from experiments.data import CaptionedImages, batch, open_dataset
from experiments.distill.draw import draw
from experiments.teacher.load import open_teacher
from experiments.teacher.teacher import Batch, Teacher
from experiments.training import FitConfig

CHUNK = 32  # pictures encoded at a time


@dataclass(frozen=True)
class Encoded:
    """Training pictures encoded in memory, the same scenes at every size.

    Attributes:
        sizes: size in pixels -> latents (n, c, h, w) and conditions.
        unconditional: the conditions of an empty caption, of one sample.
    """

    sizes: Mapping[int, Batch]
    unconditional: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.sizes.values()))["latents"])

    def batch(self, indices: Tensor, size: int) -> Batch:
        """The pictures (b,) at a size that was encoded."""
        return {name: value[indices.to(value.device)] for name, value in self.sizes[size].items()}


@dataclass(frozen=True, eq=False)
class Setting:
    """A teacher, its encoded training pictures, and held-out ones."""

    teacher: Teacher
    held_out: CaptionedImages
    encoded: Encoded

    @property
    def pipe(self) -> Any:
        """The teacher's pipeline."""
        return self.teacher.pipe

    @property
    def latents(self) -> Tensor:
        """Of the training pictures at the first size, (n, c, h, w)."""
        return next(iter(self.encoded.sizes.values()))["latents"]

    @property
    def states(self) -> Tensor:
        """Their captions' text states (n, t, d)."""
        return next(iter(self.encoded.sizes.values()))["text"]

    def batch(self, step: int, fit: FitConfig, sizes: tuple[int, ...] = (), caption_dropout: float = 0.0) -> Batch:
        """The batch of `step` for `DistillationLoss`, a function of the seed and the step alone; see `draw`.

        Args:
            sizes: among those that were encoded; (): the first.
        """
        sizes = sizes or (next(iter(self.encoded.sizes)),)
        return draw(self.encoded, step, fit, self.teacher.train_timesteps, sizes, caption_dropout)


@lru_cache(maxsize=1)
def open_setting(teacher: str, data: str, size: int, images: int, more_sizes: tuple[int, ...] = ()) -> Setting:
    """Load the teacher and encode `images` training pictures at `size` px (about 300 a second on two cores).

    They are encoded at `more_sizes` as well, the same scenes.
    """
    taught = open_teacher(teacher)
    return Setting(
        taught, open_dataset(data, split="held_out"), encode_pictures(taught, data, (size, *more_sizes), images)
    )


def encode_pictures(teacher: Teacher, data: str, sizes: tuple[int, ...], images: int) -> Encoded:
    """`images` training pictures of a data set, drawn with replacement, each scene at every size, in memory."""
    pictures = open_dataset(data, split="train")
    chosen = torch.randint(0, len(pictures), (images,), generator=torch.Generator().manual_seed(0)).tolist()
    return Encoded({size: _encoded(teacher, pictures, chosen, size) for size in sizes}, teacher.unconditional)


def _encoded(teacher: Teacher, pictures: CaptionedImages, chosen: list[int], size: int) -> Batch:
    parts = []
    for start in range(0, len(chosen), CHUNK):
        items = chosen[start : start + CHUNK]
        parts.append(teacher.encode(*batch(pictures, items, size, range(start, start + len(items)))))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def encode(pipe: Any, images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Images (b, 3, s, s) in [-1, 1] and captions -> scaled latents (b, c, s', s') and text states (b, t, d)."""
    found = Teacher(pipe).encode(images, captions)
    return found["latents"], found["text"]
