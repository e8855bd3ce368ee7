"""The denoising loop, one for every family: guidance, scheduler steps, ControlNet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from diffusers import ControlNetModel
from torch import Tensor

from unet_adapters.highres.progress import StepCallback
from unet_adapters.highres.schedule import DenoisingSchedule
from unet_adapters.hosts.calls import DenoiserCalls
from unet_adapters.hosts.unet import unet_arguments


@dataclass(frozen=True)
class ControlNetCondition:
    """A ControlNet and its input image.

    Attributes:
        network: the ControlNet.
        image: (1, 3, height, width) with values in [0, 1]; resized to every stage.
        scale: factor of the residuals, diffusers' `controlnet_conditioning_scale`.
    """

    network: ControlNetModel
    image: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """The model's prediction under classifier-free guidance (Ho and Salimans, 2207.12598).

    Attributes:
        positive, negative: conditions of the prompt and of the negative prompt: `text` (1, t, d) and, for SDXL,
            `pooled` (1, p) and `time_ids` (1, 6).
        scale: guidance scale; 1 disables guidance and halves the work.
        sequential: run the two halves one after the other, in half of the memory.
        control: a ControlNet beside the UNet, or None.
    """

    positive: Mapping[str, Tensor]
    negative: Mapping[str, Tensor]
    scale: float = 1.0
    sequential: bool = False
    control: ControlNetCondition | None = None

    def predict(self, host: DenoiserCalls, latents: Tensor, timestep: Tensor) -> Tensor:
        """Return n + scale · (p − n) for latents (1, c, h, w), with the predictions p and n for the two prompts."""
        if self.scale == 1:
            return self._run(host, latents, timestep, self.positive)
        if self.sequential:
            negative = self._run(host, latents, timestep, self.negative)
            positive = self._run(host, latents, timestep, self.positive)
        else:
            both = {key: torch.cat([self.negative[key], self.positive[key]]) for key in self.positive}
            negative, positive = self._run(host, latents.expand(2, -1, -1, -1), timestep, both).chunk(2)
        return torch.lerp(negative, positive, self.scale)

    def _run(self, host: DenoiserCalls, latents: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        residuals = {}
        if self.control is not None:
            arguments = unet_arguments(conditions)
            image = self.control.image.to(latents).expand(len(latents), -1, -1, -1)
            inputs = {key: value for key, value in arguments.items() if key != "timestep_cond"}  # for UNets only
            down, middle = self.control.network(
                latents,
                timestep,
                controlnet_cond=image,
                conditioning_scale=self.control.scale,
                return_dict=False,
                **inputs,
            )
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return host.predict(latents, timestep, conditions, **residuals)


@torch.no_grad()
def denoise(
    host: DenoiserCalls,
    guidance: ClassifierFreeGuidance,
    schedule: DenoisingSchedule,
    latents: Tensor,
    generator: torch.Generator,
    progress: StepCallback | None = None,
    before_step: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Denoise latents (1, c, h, w) over the whole image at once, from the schedule's first timestep to the end.

    Args:
        host: of the denoising network.
        guidance: how its predictions are combined.
        schedule: the timesteps.
        latents: at the first noise level.
        generator: source of the noise that stochastic schedulers add.
        before_step: called as (step number, latents) before each step; returns the latents to use. See `SkipResidual`.

    Returns:
        The clean latents (1, c, h, w).
    """
    progress = progress or (lambda completed, total: None)
    progress(0, len(schedule.timesteps))
    for number, timestep in enumerate(schedule.timesteps):
        if before_step is not None:
            latents = before_step(number, latents)
        scaled = schedule.scale_model_input(latents, timestep)
        prediction = guidance.predict(host, scaled, timestep)
        latents = schedule.step(prediction, timestep, latents, generator)
        progress(number + 1, len(schedule.timesteps))
    return latents
