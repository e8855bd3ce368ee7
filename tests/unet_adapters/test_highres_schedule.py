"""Partial schedules: with exact predictions every scheduler reaches the image, or is refused."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.unet_adapters import pipelines
from unet_adapters.highres import generate
from unet_adapters.highres.denoising import ClassifierFreeGuidance, denoise
from unet_adapters.highres.schedule import DenoisingSchedule, check_scheduler, oracle_error
from unet_adapters.hosts.unet import UNetHost

STRENGTHS = (1, 0.4, 0.3, 0.2, 0.1)
SETTINGS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
SUPPORTED = {
    *("CogVideoXDDIMScheduler", "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler"),
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler"),
    *("PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler"),
}
DETERMINISTIC = {
    *("DDIMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"),
    *("PNDMScheduler", "UniPCMultistepScheduler"),
}


FLOWS = {"FlowMatchEulerDiscreteScheduler"}  # noise levels of flows: see test_transformer_generation.py


def create_scheduler(name: str, **options: Any) -> Any:
    """Return a scheduler with SD-1.5's noise levels, or None if it cannot be built without more."""
    kind = getattr(diffusers, name)
    accepted = inspect.signature(kind.__init__).parameters
    settings = {key: value for key, value in SETTINGS.items() if key in accepted}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(**settings, **options)
    except Exception:  # other models' schedulers: each needs something of its own
        return None


SCHEDULERS = [
    name
    for name in sorted(dir(diffusers))
    if name.endswith("Scheduler") and isinstance(getattr(diffusers, name), type) and create_scheduler(name) is not None
    if name not in FLOWS
]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_reaches_the_image_or_is_refused(name: str) -> None:
    scheduler = create_scheduler(name)
    if name not in SUPPORTED:
        with pytest.raises(ValueError, match="Cannot generate with"):
            check_scheduler(scheduler, 50, STRENGTHS)
        return
    check_scheduler(scheduler, 50, STRENGTHS)
    errors = [oracle_error(scheduler, 50, strength) for strength in STRENGTHS]
    errors += [oracle_error(scheduler, steps, 0.4) for steps in (1, 3)]
    assert max(errors) < 0.06


def test_all_supported_schedulers_are_tested() -> None:
    assert set(SCHEDULERS) >= SUPPORTED


class ConstantNoise(torch.nn.Module):
    """A UNet that knows the noise that was added: any wrong step leaves a visible error, which nothing corrects."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = noise
        self.calls = 0

    def forward(self, sample: Tensor, timestep: Tensor, **options: Any) -> tuple[Tensor]:
        self.calls += 1
        return (self.noise,)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", sorted(DETERMINISTIC))
def test_the_noise_that_was_added_is_removed(name: str, strength: float) -> None:
    schedule = DenoisingSchedule.create(create_scheduler(name), 50, strength, "cpu")
    image = pipelines.noise(1, 4, 8, 8, seed=1)
    unet = ConstantNoise(pipelines.noise(1, 4, 8, 8, seed=2))
    conditions = {"text": torch.zeros(1, 1, 1)}
    if strength == 1:  # pure noise: the image that it comes from is whatever the schedule leaves of it
        first = schedule.timesteps[:1]
        latents = schedule.scheduler.add_noise(image, unet.noise, first)
    else:
        latents = schedule.add_noise(image, unet.noise)
    result = denoise(
        UNetHost(unet), ClassifierFreeGuidance(conditions, conditions), schedule, latents, torch.Generator()
    )
    final = create_scheduler("DDIMScheduler").alphas_cumprod[0]
    remaining = (1 - final) ** 0.5 if name in ("DDIMScheduler", "DEISMultistepScheduler", "PNDMScheduler") else 0.0
    expected = image * (1 - remaining**2) ** 0.5 + remaining * unet.noise
    assert (result - expected).abs().max() < 2e-3
    assert unet.calls == len(schedule.timesteps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_every_prediction_type_reaches_the_image(name: str, prediction_type: str) -> None:
    scheduler = create_scheduler(name, prediction_type=prediction_type)
    assert max(oracle_error(scheduler, 20, strength) for strength in STRENGTHS) < 0.04


@pytest.mark.parametrize("order", [1, 2])
def test_strength_counts_whole_steps(order: int) -> None:
    scheduler = create_scheduler("DDIMScheduler" if order == 1 else "HeunDiscreteScheduler")
    whole = DenoisingSchedule.create(scheduler, 10, 1.0, "cpu")
    part = DenoisingSchedule.create(scheduler, 10, 0.3, "cpu")
    assert torch.equal(part.timesteps, whole.timesteps[7 * order :]) and len(part.timesteps) == 3 * order - (order - 1)
    assert len(DenoisingSchedule.create(scheduler, 10, 0.01, "cpu").timesteps) == 1


@pytest.mark.parametrize("mode", ["progressive", "direct"])
def test_a_schedule_that_fails_from_a_start_image_is_refused(mode: str) -> None:
    pipe = pipelines.make()
    pipe.scheduler = create_scheduler("EDMEulerScheduler") or diffusers.EDMEulerScheduler()
    calls: list[str] = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append("unet"))
    image = Image.new("RGB", (32, 32))
    with pytest.raises(ValueError, match="Cannot generate with EDMEulerScheduler"):
        generate(pipe, "abc", (32, 32), image=image, strength=0.5, mode=mode, base_size=32, steps=3)
    assert not calls


def test_a_schedule_of_flows_is_refused_for_a_diffusion_model() -> None:
    pipe = pipelines.make()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"Cannot generate with FlowMatchEuler.*predicts noise.*DDIMScheduler"):
        generate(pipe, "abc", (32, 32), base_size=32, steps=3)


def test_a_scheduler_without_add_noise_is_refused_before_the_first_stage() -> None:
    pipe = pipelines.make()
    pipe.scheduler = diffusers.IPNDMScheduler()
    calls: list[str] = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append("unet"))
    with pytest.raises(ValueError, match="Cannot generate with IPNDMScheduler: it has no add_noise"):
        generate(pipe, "abc", (64, 64), base_size=32, steps=3)
    assert not calls
