"""The batch of a step: pictures, noise, timesteps, dropped captions, sampled rows; a function of (seed, step) alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from experiments.teacher.teacher import Batch
from experiments.training import FitConfig, pick

ROWS = 32  # of every picture's matrices, for objectives that compare them


class Latents(Protocol):
    """Encoded pictures, in memory or on disk."""

    @property
    def unconditional(self) -> Mapping[str, Tensor]:
        """The conditions of an empty caption, of one sample: text (t, d), and pooled (p,) where there is one."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, size: int) -> Batch:
        """Latents and conditions of pictures (b,) at a size in pixels."""


def draw(
    latents: Latents,
    step: int,
    fit: FitConfig,
    train_timesteps: int,
    sizes: tuple[int, ...],
    caption_dropout: float = 0.0,
) -> Batch:
    """The global batch of a step, the same on every process, whatever the number of processes.

    Args:
        latents: where pictures come from.
        fit: its seed and batch size.
        train_timesteps: timesteps are drawn from 0 … this − 1.
        sizes: of pictures; step by step in turn.
        caption_dropout: share of captions that are replaced by the empty one.

    Returns:
        What `latents` gives, and: noise (b, c, h, w), timesteps (b,), rows (b, r) in [0, 1), step (b,). Random numbers
        are drawn on the CPU in float32, so that they are the same on every device.
    """
    batch = dict(latents.batch(pick(step, fit, len(latents)), sizes[step % len(sizes)]))
    clean = batch["latents"] = batch["latents"].float()
    generator, count = torch.Generator().manual_seed(fit.seed * 1_000_003 + step), len(clean)
    drawn = {
        "noise": torch.randn(clean.shape, generator=generator),
        "timesteps": torch.randint(0, train_timesteps, (count,), generator=generator),
        "rows": torch.rand(count, ROWS, generator=generator),
    }
    dropped = torch.rand(count, generator=generator) < caption_dropout
    for name, value in latents.unconditional.items():
        blank = value.to(batch[name])
        batch[name] = torch.where(dropped.to(blank.device).view(-1, *[1] * blank.ndim), blank, batch[name])
    batch |= {name: value.to(clean.device) for name, value in drawn.items()}
    return batch | {"step": torch.full((count,), step)}
