"""How to train, as data."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class FitConfig(BaseModel):
    """How to train. A step is one optimizer update."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0, description="of all processes and micro-batches together")
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(50, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up; cosine: to a tenth")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the weight average that is kept at the end; 0: none")
    accumulation: int = Field(1, gt=0, description="micro-batches that a process takes one after the other")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("no", description="of the forward pass; losses are float32")
    checkpoint_every: int = Field(100, gt=0)
    keep: int = Field(2, gt=0, description="checkpoints on disk")
    log_every: int = Field(10, gt=0)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    seed: int = 0


def learning_rate_factor(step: int, config: FitConfig) -> float:
    """Share of the learning rate at `step`: linear warm-up, then 1, or a cosine from 1 to 0.1."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    if config.schedule == "constant":
        return warm
    done = min(1.0, max(0, step - config.warmup) / max(1, config.steps - config.warmup))
    return warm * (0.55 + 0.45 * math.cos(math.pi * done))


def pick(step: int, config: FitConfig, total: int) -> Tensor:
    """Indices of the batch of `step`: a function of the seed and the step alone."""
    generator = torch.Generator().manual_seed(config.seed * 7_000_003 + step)
    return torch.randint(0, total, (config.batch_size,), generator=generator)
