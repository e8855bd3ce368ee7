"""How one training runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from experiments.config.base import FrozenModel


class FitConfig(FrozenModel):
    """The settings of `experiments.training.fit`. A step is one optimizer update."""

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0, description="samples of all processes and micro-batches together")
    learning_rate: float = Field(gt=0)
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: for the weights of linear layers, with AdamW for the rest"
    )
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(50, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "constant", "inverse_sqrt"] = Field(
        "cosine", description="after the warm-up; cosine ends at a tenth, inverse_sqrt falls as (warmup / step)^½"
    )
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the weight average that replaces the weights; 0: none")
    accumulation: int = Field(1, gt=0, description="micro-batches that each process runs one after the other")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("no", description="of the forward pass; losses are float32")
    checkpoint_every: int = Field(100, gt=0, description="steps")
    keep: int = Field(2, gt=0, description="checkpoints on disk")
    log_every: int = Field(10, gt=0, description="steps")
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    seed: int = 0
