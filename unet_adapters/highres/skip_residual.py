"""DemoFusion's skip residual against repeated objects in images larger than those of the training."""

from __future__ import annotations

import math

from torch import Tensor

from unet_adapters.highres.schedule import DenoisingSchedule


class SkipResidual:
    """Mix the noised upscaled image into the latents of early steps (DemoFusion, 2311.16973, eq. 5).

    x_t ← c · x'_t + (1 − c) · x_t with c = ((1 + cos(π · (T − t) / T)) / 2)^power, where x'_t is the upscaled image at
    the noise level of step t and T is the number of training timesteps.
    """

    def __init__(self, upscaled: Tensor, noise: Tensor, schedule: DenoisingSchedule, power: float) -> None:
        """Keep what every step needs.

        Args:
            upscaled: clean latents (1, c, h, w) of the upscaled image.
            noise: (1, c, h, w).
            schedule: that of the stage.
            power: exponent of the cosine; larger values let go of the upscaled image earlier.
        """
        self.upscaled = upscaled
        self.noise = noise
        self.schedule = schedule
        self.power = power

    def __call__(self, number: int, latents: Tensor) -> Tensor:
        """Return the latents to use at step `number`."""
        total = self.schedule.scheduler.config.num_train_timesteps
        completed = (total - float(self.schedule.timesteps[number])) / total
        share = ((1 + math.cos(math.pi * completed)) / 2) ** self.power
        return latents.lerp(self.schedule.add_noise(self.upscaled, self.noise, number).to(latents.dtype), share)
