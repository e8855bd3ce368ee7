"""The part of a diffusers schedule that a stage runs, and a check that a scheduler reaches the image from there."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LMSDiscreteScheduler, PNDMScheduler
from torch import Tensor

MAX_ORACLE_ERROR = 0.1
"""Schedules that end at a small noise level instead of zero, as SD-1.5's, are 0.03 from the image."""

_REQUIRED = ("add_noise", "alphas_cumprod", "init_noise_sigma", "scale_model_input", "set_timesteps", "step")
_REQUIRED_OF_FLOWS = ("set_timesteps", "step")


@dataclass(frozen=True)
class DenoisingSchedule:
    """The timesteps of a scheduler that one stage runs.

    Attributes:
        scheduler: a copy of the pipeline's scheduler with its timesteps set. Multistep schedulers keep a history, so
            every stage has its own copy.
        timesteps: one per call of the UNet; second-order schedulers have two for each step but the last.
    """

    scheduler: Any
    timesteps: Tensor = field(repr=False)

    @classmethod
    def create(
        cls,
        scheduler: Any,
        steps: int,
        strength: float,
        device: str | torch.device,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> DenoisingSchedule:
        """Return the last `strength` of a schedule of `steps` steps, one step at least.

        Args:
            scheduler: a diffusers scheduler; it is copied.
            steps: scheduler steps of the whole schedule.
            strength: above 0 and up to 1; 1 is the whole schedule.
            device: of the timesteps.
            options: further arguments of `set_timesteps`; see `DenoiserCalls.timestep_options`.
        """
        own = copy.deepcopy(scheduler)
        own.set_timesteps(steps, device=device, **options)
        if isinstance(own, PNDMScheduler):
            return _partial_pndm(own, steps, strength, device)
        order = getattr(own, "order", 1)
        first = _skipped_steps(-(-len(own.timesteps) // order), strength) * order
        if isinstance(own, LMSDiscreteScheduler):  # its coefficients assume a history back to the first sigma
            own.sigmas = own.sigmas[first:]
            own.timesteps = own.timesteps[first:]
            first = 0
        if hasattr(own, "set_begin_index"):
            own.set_begin_index(first)
        return cls(own, own.timesteps[first:])

    def add_noise(self, latents: Tensor, noise: Tensor, step: int = 0) -> Tensor:
        """Bring clean latents to the noise level of step number `step`."""
        if is_flow(self.scheduler):
            return torch.lerp(latents, noise, flow_sigma(self.scheduler, self.timesteps[step]).to(latents.dtype))
        return self.scheduler.add_noise(latents, noise, self.timesteps[step : step + 1])

    @property
    def initial_sigma(self) -> float:
        """Standard deviation of the latents at the first noise level of the whole schedule."""
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Return what the model is called with at a timestep."""
        if is_flow(self.scheduler):
            return latents
        scaled: Tensor = self.scheduler.scale_model_input(latents, timestep)
        return scaled

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Return the latents of the next noise level.

        Args:
            prediction: the UNet's output.
            timestep: one of `timesteps`, in their order.
            latents: those of the current noise level.
            generator: source of the noise that stochastic schedulers add.
        """
        accepts_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        noise = {"generator": generator} if accepts_generator else {}
        following: Tensor = self.scheduler.step(prediction, timestep, latents, return_dict=False, **noise)[0]
        return following


def is_flow(scheduler: Any) -> bool:
    """Return whether a scheduler samples from a rectified flow, whose model predicts noise minus image."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def flow_sigma(scheduler: Any, timestep: Tensor) -> Tensor:
    """Return the share of noise at a timestep of a flow."""
    return timestep / scheduler.config.num_train_timesteps


def _skipped_steps(steps: int, strength: float) -> int:
    return min(steps - 1, round(steps * (1 - strength)))


def _partial_pndm(scheduler: PNDMScheduler, steps: int, strength: float, device: str | torch.device) -> Any:
    """Return the end of a PNDM schedule, which repeats its own second timestep: the first step is taken twice."""
    if strength == 1:
        return DenoisingSchedule(scheduler, scheduler.timesteps)
    own = PNDMScheduler.from_config(scheduler.config, skip_prk_steps=True)  # Runge-Kutta steps exist at the start only
    own.set_timesteps(steps, device=device)
    distinct = torch.unique_consecutive(own.timesteps)
    last = distinct[_skipped_steps(len(distinct), strength) :]
    return DenoisingSchedule(own, torch.cat([last[:2], last[1:]]))


def check_scheduler(
    scheduler: Any,
    steps: int,
    strengths: Iterable[float],
    options: Mapping[str, Any] = MappingProxyType({}),
    predicts_flow: bool | None = None,
) -> None:
    """Check that a scheduler reaches the image from each of these strengths, in milliseconds.

    A tiny image is denoised by an oracle that predicts its noise exactly; a valid schedule then ends at the image.
    Strength 1 runs the scheduler's own whole schedule and is not checked.

    Args:
        scheduler: a diffusers scheduler; it is unchanged.
        steps: scheduler steps of the whole schedule.
        strengths: of the stages.
        options: further arguments of `set_timesteps`; see `DenoiserCalls.timestep_options`.
        predicts_flow: whether the model predicts a flow, which needs a flow's scheduler; None: unknown.

    Raises:
        ValueError: If it does not, lacks a method that stages need, or is made for models of the other kind.
    """
    name = type(scheduler).__name__
    flow = is_flow(scheduler)
    advice = f"Use {_suitable_schedulers(flow if predicts_flow is None else predicts_flow)}."
    if predicts_flow is not None and flow != predicts_flow:
        kind = "the velocity of a flow" if predicts_flow else "noise on a diffusion schedule"
        raise ValueError(f"Cannot generate with {name}: this model predicts {kind}. {advice}")
    required = _REQUIRED_OF_FLOWS if flow else _REQUIRED
    missing = [attribute for attribute in required if not hasattr(scheduler, attribute)]
    if missing:
        raise ValueError(
            f"Cannot generate with {name}: it has no {', '.join(missing)}, which a stage needs to start from an image. "
            f"{advice}"
        )
    for strength in sorted(set(strengths) - {1}):
        try:
            error = oracle_error(scheduler, steps, strength, options)
        except (TypeError, NotImplementedError, IndexError) as reason:
            raise ValueError(f"Cannot generate with {name}: {str(reason).splitlines()[0]}. {advice}") from reason
        if not error <= MAX_ORACLE_ERROR:
            raise ValueError(
                f"Cannot generate with {name}: with {steps} steps and strength {strength:g}, an exact prediction of "
                f"the noise ends {error:.2g} from the image (RMS), at most {MAX_ORACLE_ERROR} is expected. {advice}"
            )


def _suitable_schedulers(flow: bool) -> str:
    if flow:
        return "diffusers.FlowMatchEulerDiscreteScheduler"
    return "a scheduler of Stable Diffusion, for example diffusers.DDIMScheduler"


def oracle_error(
    scheduler: Any, steps: int, strength: float, options: Mapping[str, Any] = MappingProxyType({})
) -> float:
    """Return the RMS distance from the image at which a schedule ends if the noise is predicted exactly."""
    schedule = DenoisingSchedule.create(scheduler, steps, strength, "cpu", options)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 4, 4, 4, generator=generator) * 2 - 1
    noise = torch.randn(image.shape, generator=generator)
    latents = noise * schedule.initial_sigma if strength == 1 else schedule.add_noise(image, noise)
    for timestep in schedule.timesteps:
        scaled = schedule.scale_model_input(latents, timestep)
        prediction = _exact_prediction(schedule.scheduler, scaled, timestep, image)
        latents = schedule.step(prediction, timestep, latents, generator)
    return float((latents - image).square().mean().sqrt())


def _exact_prediction(scheduler: Any, scaled: Tensor, timestep: Tensor, image: Tensor) -> Tensor:
    """Return what a perfect UNet predicts for its input `scaled`, if the clean latents are `image`."""
    if is_flow(scheduler):
        return (scaled - image) / flow_sigma(scheduler, timestep)
    signal = _signal_share(scheduler.alphas_cumprod, float(timestep))
    noise_level = (1 - signal) ** 0.5
    noise = (scaled - signal**0.5 * image) / noise_level
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return signal**0.5 * noise - noise_level * image
    if kind == "sample":
        return image
    raise ValueError(
        f"Cannot generate with a scheduler of prediction_type {kind!r}: expected epsilon, v_prediction or sample."
    )


def _signal_share(alphas_cumprod: Tensor, timestep: float) -> float:
    """Interpolate ᾱ at a timestep, which need not be an integer, linearly in log(σ) = log(√((1 − ᾱ) / ᾱ))."""
    alphas = alphas_cumprod.double().cpu().clamp(1e-12, 1 - 1e-12)
    log_sigmas = ((1 - alphas) / alphas).log() / 2
    low = min(max(int(timestep), 0), len(log_sigmas) - 1)
    high = min(low + 1, len(log_sigmas) - 1)
    log_sigma = torch.lerp(log_sigmas[low], log_sigmas[high], min(max(timestep - low, 0.0), 1.0))
    return float(1 / (1 + (2 * log_sigma).exp()))
