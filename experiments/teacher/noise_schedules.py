"""How noise is added in training, and what a perfect model then predicts: diffusion and flow matching."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction")


class NoiseSchedule(ABC):
    """The noise levels t = 0 … train_timesteps − 1 that a model is trained on, the last the noisiest.

    Attributes:
        config: of the pipeline's scheduler.
    """

    config: Any

    @property
    def train_timesteps(self) -> int:
        """The number of noise levels."""
        return int(self.config.num_train_timesteps)

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Bring latents (b, c, h, w) to the noise levels (b,)."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what a perfect model predicts, (b, c, h, w)."""

    @abstractmethod
    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        """Return the timesteps (b,) that the model is called with at these noise levels."""


class DiffusionSchedule(NoiseSchedule):
    """x_t = √ᾱ_t x + √(1 − ᾱ_t) ε; the model predicts ε, or the velocity √ᾱ_t ε − √(1 − ᾱ_t) x."""

    def __init__(self, config: Any) -> None:
        self._scheduler = DDIMScheduler.from_config(config)
        self.config = self._scheduler.config
        if self.config.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"Cannot distill a model that predicts {self.config.prediction_type!r}: expected "
                f"{' or '.join(PREDICTION_TYPES)}."
            )

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Bring latents (b, c, h, w) to the noise levels (b,)."""
        return self._scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noise or the velocity."""
        if self.config.prediction_type == "epsilon":
            return noise
        return self._scheduler.get_velocity(latents, noise, timesteps)

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        """Return the timesteps themselves."""
        return timesteps


class FlowSchedule(NoiseSchedule):
    """Rectified flow (2209.03003): x_σ = (1 − σ) x + σ ε; the model predicts the velocity ε − x, at the time 1000 σ.

    The levels σ are those of the pipeline's scheduler, with its shift towards noise (2403.03206 §5.3.2), unless that
    depends on the size of the image, as Flux's does: then they are equally spaced.
    """

    def __init__(self, config: Any) -> None:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        self.config = scheduler.config
        self.sigmas = scheduler.sigmas[: self.train_timesteps].flip(0)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Interpolate between latents and noise (b, c, h, w)."""
        sigmas = self._sigmas_at(timesteps, latents)[:, None, None, None]
        return torch.lerp(latents, noise.to(latents.dtype), sigmas.to(latents.dtype))

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the velocity, which does not depend on the noise level."""
        return noise - latents

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        """Return σ times the number of noise levels."""
        return self._sigmas_at(timesteps, timesteps) * self.train_timesteps

    def _sigmas_at(self, timesteps: Tensor, like: Tensor) -> Tensor:
        return self.sigmas.to(like.device)[timesteps.to(like.device)]


def create_noise_schedule(scheduler: Any) -> NoiseSchedule:
    """Return the training schedule that a pipeline's scheduler samples from.

    Raises:
        ValueError: the model predicts neither noise nor velocity.
    """
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.get("use_flow_sigmas", False)
    return FlowSchedule(scheduler.config) if flow else DiffusionSchedule(scheduler.config)
