"""The batch of a step: images, noise, timesteps, dropped captions, sampled rows; a function of (seed, step) alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from experiments.config import FitConfig
from experiments.teacher.teacher import Batch
from experiments.training import batch_indices

ROWS = 32
"""Rows of every image's mixing matrices that are sampled, for objectives that compare them."""


class LatentSource(Protocol):
    """Encoded images, in memory or on disk."""

    @property
    def unconditional(self) -> Mapping[str, Tensor]:
        """The conditions of an empty caption, of one sample: text (t, d), and pooled (p,) if there is one."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, size: int) -> Batch:
        """Return latents and conditions of the images `indices` (b,) at a size in pixels."""


def draw_batch(
    latents: LatentSource,
    step: int,
    fit: FitConfig,
    train_timesteps: int,
    sizes: tuple[int, ...],
    caption_dropout: float = 0.0,
) -> Batch:
    """Draw the global batch of a step, the same on every process, whatever the number of processes.

    Args:
        latents: where images come from.
        step: number of the step.
        fit: its seed and batch size.
        train_timesteps: timesteps are drawn from 0 … this − 1.
        sizes: sides of the images in pixels; each step uses the next one.
        caption_dropout: share of captions that are replaced by the empty one.

    Returns:
        What `latents` gives, and: noise (b, c, h, w), timesteps (b,), rows (b, r) in [0, 1), step (b,). Random numbers
        are drawn on the CPU in float32, so that they are the same on every device.
    """
    batch = dict(latents.batch(batch_indices(step, fit, len(latents)), sizes[step % len(sizes)]))
    batch["latents"] = clean = batch["latents"].float()
    count = len(clean)
    generator = torch.Generator().manual_seed(fit.seed * 1_000_003 + step)
    random = {
        "noise": torch.randn(clean.shape, generator=generator),
        "timesteps": torch.randint(0, train_timesteps, (count,), generator=generator),
        "rows": torch.rand(count, ROWS, generator=generator),
    }
    dropped = torch.rand(count, generator=generator) < caption_dropout
    for name, value in latents.unconditional.items():
        blank = value.to(batch[name])
        mask = dropped.to(blank.device).view(-1, *[1] * blank.ndim)
        batch[name] = torch.where(mask, blank, batch[name])
    batch |= {name: value.to(clean.device) for name, value in random.items()}
    return batch | {"step": torch.full((count,), step)}
