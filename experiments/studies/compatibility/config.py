"""What the compatibility study trains and samples."""

from __future__ import annotations

from pydantic import Field

from experiments.ablation import load_grid
from experiments.config import FitConfig, FrozenModel, Grid

CONTROLNET_FIT = FitConfig(steps=700, batch_size=16, learning_rate=1e-3, warmup=50, ema=0.99, checkpoint_every=50)
IP_ADAPTER_FIT = FitConfig(steps=400, batch_size=16, learning_rate=1e-3, warmup=50, ema=0.99, checkpoint_every=50)


class SamplingConfig(FrozenModel):
    """What is sampled: every model gets the same seeds and sampler."""

    images: int = Field(32, gt=0, description="of each split")
    sizes: tuple[int, ...] = Field((64, 128), description="for the ControlNet; the IP-Adapter uses the first alone")
    steps: int = Field(12, gt=0)
    guidance: float = Field(3.0, gt=1)
    seed: int = 0


class CompatibilityConfig(FrozenModel):
    """Everything that the numbers depend on."""

    grid: Grid = Field(description="its first cell is the student")
    controlnet: FitConfig = CONTROLNET_FIT
    ip_adapter: FitConfig = IP_ADAPTER_FIT
    controlnet_caption_dropout: float = Field(
        0.5, description="as in ControlNet's paper (2302.05543 §3.4), so that the model learns to use the edges"
    )
    ip_adapter_caption_dropout: float = 0.8
    ip_adapter_image_dropout: float = 0.1
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0

    def scaled(self, share: float) -> CompatibilityConfig:
        """Return a copy with the steps of every training multiplied by `share`, at least one each, for trials."""
        distillation = self.grid.distillation.model_copy(
            update={"fit": _scale_steps(self.grid.distillation.fit, share)}
        )
        changes = {
            "controlnet": _scale_steps(self.controlnet, share),
            "ip_adapter": _scale_steps(self.ip_adapter, share),
            "grid": self.grid.model_copy(update={"distillation": distillation}),
        }
        return self.model_copy(update=changes)


def default_config(share: float = 1.0) -> CompatibilityConfig:
    """Return the study of the embedded teacher, with `share` of its training steps."""
    return CompatibilityConfig(grid=load_grid("compatibility")).scaled(share)


def _scale_steps(config: FitConfig, share: float) -> FitConfig:
    return config.model_copy(update={"steps": max(1, round(config.steps * share))})
