"""What each step does, as functions of the seed and the step alone: its learning rate and its samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experiments.config import FitConfig


def learning_rate_factor(step: int, config: FitConfig) -> float:
    """Return the share of the learning rate at a step: linear warm-up, then what `config.schedule` says.

    `"constant"`: 1; `"inverse_sqrt"`: (warmup / step)^½, for trainings without a fixed end (1706.03762); `"cosine"`:
    from 1 to 0.1 at the last step.
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    if config.schedule == "constant":
        return warm
    if config.schedule == "inverse_sqrt":
        return warm * math.sqrt(min(1.0, max(1, config.warmup) / (step + 1)))
    progress = min(1.0, max(0, step - config.warmup) / max(1, config.steps - config.warmup))
    return warm * (0.55 + 0.45 * math.cos(math.pi * progress))


def batch_indices(step: int, config: FitConfig, total: int) -> Tensor:
    """Return the indices of a step's samples among `total`, drawn with replacement: (batch_size,) int64."""
    generator = torch.Generator().manual_seed(config.seed * 7_000_003 + step)
    return torch.randint(0, total, (config.batch_size,), generator=generator)
