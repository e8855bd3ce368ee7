"""The denoising loop, the same for every family of Stable Diffusion: guidance, scheduler steps, extras."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from unet_adapters.hosts.unet import unet_arguments

Report = Callable[[int, int], None]
"""(steps done, steps)."""


@dataclass(frozen=True)
class Control:
    """A ControlNet and the picture it looks at, (1, 3, height, width) in 0 … 1, of the stage's size."""

    network: ControlNetModel
    image: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class Guide:
    """What the UNet is told: the prompt's conditions and, under guidance, those of the negative prompt.

    Attributes:
        positive, negative: `text` (1, t, d) and, of SDXL, `pooled` (1, p) and `time_ids` (1, 6).
        scale: of classifier-free guidance; 1 is none, and asks for half of the work.
        one_by_one: run the two halves one after the other, in half of the memory.
        control: a ControlNet beside the UNet, or None.
    """

    positive: Mapping[str, Tensor]
    negative: Mapping[str, Tensor]
    scale: float = 1.0
    one_by_one: bool = False
    control: Control | None = None

    def predict(self, unet: Any, latents: Tensor, timestep: Tensor) -> Tensor:
        """The guided prediction for latents (1, c, h, w): u + scale · (p − u)."""
        if self.scale == 1:
            return self._run(unet, latents, timestep, self.positive)
        if self.one_by_one:
            against = self._run(unet, latents, timestep, self.negative)
            towards = self._run(unet, latents, timestep, self.positive)
        else:
            both = {key: torch.cat([self.negative[key], self.positive[key]]) for key in self.positive}
            against, towards = self._run(unet, latents.expand(2, -1, -1, -1), timestep, both).chunk(2)
        return torch.lerp(against, towards, self.scale)

    def _run(self, unet: Any, latents: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        arguments = unet_arguments(conditions)
        residuals = {}
        if self.control is not None:
            image = self.control.image.to(latents).expand(len(latents), -1, -1, -1)
            down, middle = self.control.network(
                latents,
                timestep,
                controlnet_cond=image,
                conditioning_scale=self.control.scale,
                return_dict=False,
                **arguments,
            )
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return unet(latents, timestep, return_dict=False, **arguments, **residuals)[0]


@dataclass(frozen=True)
class Schedule:
    """A scheduler's timesteps, or the last `strength` of them.

    Attributes:
        scheduler: a copy of the pipeline's, with its timesteps set; steps have a memory, so each stage has its own.
        timesteps: those that run.
    """

    scheduler: Any
    timesteps: Tensor = field(repr=False)

    @classmethod
    def of(cls, scheduler: Any, steps: int, strength: float, device: torch.device) -> Schedule:
        """`steps` timesteps of a copy of `scheduler`, of which the last `strength` run, one at least."""
        own = copy.deepcopy(scheduler)
        own.set_timesteps(steps, device=device)
        skipped = min(len(own.timesteps) - 1, round(len(own.timesteps) * (1 - strength)))
        if hasattr(own, "set_begin_index"):
            own.set_begin_index(skipped)
        return cls(own, own.timesteps[skipped:])

    def noised(self, latents: Tensor, noise: Tensor, step: int = 0) -> Tensor:
        """Latents with the noise of the timestep that runs as number `step`."""
        return self.scheduler.add_noise(latents, noise, self.timesteps[step : step + 1])


@torch.no_grad()
def denoise(
    unet: Any,
    guide: Guide,
    schedule: Schedule,
    latents: Tensor,
    generator: torch.Generator,
    report: Report | None = None,
    before: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Latents (1, c, h, w) at the first timestep -> clean latents, over the whole image at once.

    Args:
        before: (number of the step, latents) -> latents, called before each step; see `highres.tricks`.
    """
    report = report or (lambda done, total: None)
    report(0, len(schedule.timesteps))
    for number, timestep in enumerate(schedule.timesteps):
        if before is not None:
            latents = before(number, latents)
        scaled = schedule.scheduler.scale_model_input(latents, timestep)
        prediction = guide.predict(unet, scaled, timestep)
        latents = _step(schedule.scheduler, prediction, timestep, latents, generator)
        report(number + 1, len(schedule.timesteps))
    return latents


def _step(scheduler: Any, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    noise = {"generator": generator} if takes_generator else {}
    stepped: Tensor = scheduler.step(prediction, timestep, latents, return_dict=False, **noise)[0]
    return stepped
