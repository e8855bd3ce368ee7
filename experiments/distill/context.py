"""A teacher and its training data, opened once and shared by the cells of a grid."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from experiments.config import FitConfig
from experiments.core.files import folder_state
from experiments.data import CaptionedImages, batch, open_dataset
from experiments.distill.batches import draw_batch
from experiments.teacher.load import open_teacher
from experiments.teacher.teacher import Batch, Teacher

CHUNK = 32
"""Images that are encoded at a time."""


@dataclass(frozen=True)
class EncodedImages:
    """Training images encoded in memory, the same scenes at every size.

    Attributes:
        sizes: size in pixels -> latents (n, c, h, w) and conditions.
        unconditional: the conditions of an empty caption, of one sample.
        source_digest: SHA-256 of the images and captions before encoding. With the teacher's fingerprint it identifies
            the latents on every machine, although their last bits differ between processors.
    """

    sizes: Mapping[int, Batch]
    unconditional: Mapping[str, Tensor]
    source_digest: str

    def __len__(self) -> int:
        return len(next(iter(self.sizes.values()))["latents"])

    def batch(self, indices: Tensor, size: int) -> Batch:
        """Return the images `indices` (b,) at a size that was encoded."""
        return {name: value[indices.to(value.device)] for name, value in self.sizes[size].items()}


@dataclass(frozen=True, eq=False)
class DistillationContext:
    """A teacher, its encoded training images, and held-out images."""

    teacher: Teacher
    held_out: CaptionedImages
    encoded: EncodedImages

    @property
    def pipe(self) -> Any:
        """The teacher's pipeline."""
        return self.teacher.pipe

    @property
    def latents(self) -> Tensor:
        """The training images at the first size, (n, c, h, w)."""
        return next(iter(self.encoded.sizes.values()))["latents"]

    @property
    def text_states(self) -> Tensor:
        """The text encoder's states of their captions, (n, t, d)."""
        return next(iter(self.encoded.sizes.values()))["text"]

    def batch(self, step: int, fit: FitConfig, sizes: tuple[int, ...] = (), caption_dropout: float = 0.0) -> Batch:
        """Draw the batch of a step for `DistillationLoss`, as `draw_batch` does.

        Args:
            step: number of the step.
            fit: its seed and batch size.
            sizes: among those that were encoded; (): the first.
            caption_dropout: share of captions that are replaced by the empty one.
        """
        sizes = sizes or (next(iter(self.encoded.sizes)),)
        return draw_batch(self.encoded, step, fit, self.teacher.train_timesteps, sizes, caption_dropout)


def open_context(
    teacher: str,
    data: str,
    size: int,
    images: int,
    more_sizes: tuple[int, ...] = (),
    variant: str | None = None,
) -> DistillationContext:
    """Load a teacher and encode its training images, about 300 a second at 64 px on two cores.

    The last context is kept, and returned again for the same arguments unless their files have changed.

    Args:
        teacher: as `open_teacher` takes it.
        data: as `open_dataset` takes it.
        size: of the images in pixels.
        images: how many.
        more_sizes: further sizes at which the same scenes are encoded.
        variant: the teacher's weight files to read, as `open_teacher` takes it.
    """
    files = (folder_state(teacher), folder_state(data.partition("#")[0]))
    return _open_context(teacher, variant, data, (size, *more_sizes), images, files)


@lru_cache(maxsize=1)
def _open_context(
    teacher: str, variant: str | None, data: str, sizes: tuple[int, ...], images: int, files: tuple[str, str]
) -> DistillationContext:
    opened = open_teacher(teacher, variant=variant)
    held_out = open_dataset(data, split="held_out")
    return DistillationContext(opened, held_out, encode_images(opened, data, sizes, images))


def encode_images(teacher: Teacher, data: str, sizes: tuple[int, ...], images: int) -> EncodedImages:
    """Encode training images of a data set, drawn with replacement, each scene at every size, in memory."""
    dataset = open_dataset(data, split="train")
    indices = torch.randint(0, len(dataset), (images,), generator=torch.Generator().manual_seed(0)).tolist()
    digest = hashlib.sha256()
    encoded = {size: _encode_at(teacher, dataset, indices, size, digest) for size in sizes}
    return EncodedImages(encoded, teacher.unconditional, digest.hexdigest())


def _encode_at(teacher: Teacher, dataset: CaptionedImages, indices: list[int], size: int, digest: Any) -> Batch:
    parts = []
    for start in range(0, len(indices), CHUNK):
        items = indices[start : start + CHUNK]
        pixels, captions = batch(dataset, items, size, range(start, start + len(items)))
        digest.update(f"{tuple(pixels.shape)} {captions}".encode())
        digest.update(pixels.contiguous().numpy().data)
        parts.append(teacher.encode(pixels, captions))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
