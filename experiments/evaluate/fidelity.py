"""How close a student stays to its teacher and to the truth, at resolutions it was and was not trained on."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from experiments.config import Evaluation
from experiments.data import batch
from experiments.distil.objective import target
from experiments.distil.setting import Setting, encode
from unet_adapters import MixerAdapter


@torch.no_grad()
def fidelity(setting: Setting, adapter: MixerAdapter, config: Evaluation) -> list[dict[str, float]]:
    """Errors of the student at each size, on held-out pictures rendered at that size.

    The same noise and timesteps for every variant. Returned for each size, as means over
    pictures, timesteps and elements:
        error_to_teacher: squared difference of the two predictions;
        relative_error_to_teacher: that over the mean square of the teacher's prediction;
        error_to_truth, teacher_error_to_truth: squared error against the true noise (or velocity);
        error_ratio: the first of these over the second; 1 means as good as the teacher.
    """
    return [_at_size(setting, adapter, size, config) for size in config.sizes]


def _at_size(setting: Setting, adapter: MixerAdapter, size: int, config: Evaluation) -> dict[str, float]:
    sums = torch.zeros(4, dtype=torch.float64)
    for noisy, steps, text, truth, taught in teacher_views(setting, size, config):
        with adapter.mounted():
            learned = setting.pipe.unet(noisy, steps, text).sample
        pairs = ((learned, taught), (taught, torch.zeros_like(taught)), (learned, truth), (taught, truth))
        sums += torch.stack([(a - b).double().square().mean() for a, b in pairs]).cpu()
    apart, power, student, teacher = (sums / len(config.timesteps)).tolist()
    return {
        "size": size,
        "error_to_teacher": apart,
        "relative_error_to_teacher": apart / power,
        "error_to_truth": student,
        "teacher_error_to_truth": teacher,
        "error_ratio": student / teacher,
    }


@lru_cache(maxsize=8)
def teacher_views(setting: Setting, size: int, config: Evaluation) -> list[tuple[Tensor, ...]]:
    """(noisy, timestep, text, truth, teacher's prediction) for each timestep; kept for the next variant."""
    indices = torch.linspace(0, len(setting.held_out) - 1, config.images).long().tolist()
    images, captions = batch(setting.held_out, indices, size, [0] * config.images)
    latents, text = encode(setting.pipe, images, captions)
    scheduler, draw = setting.pipe.scheduler, torch.Generator().manual_seed(config.seed)
    views: list[tuple[Tensor, ...]] = []
    for time in config.timesteps:
        noise = torch.randn(latents.shape, generator=draw).to(latents.device)
        steps = torch.full((len(latents),), time, device=latents.device)
        noisy = scheduler.add_noise(latents, noise, steps)
        taught = setting.pipe.unet(noisy, steps, text).sample
        views.append((noisy, steps, text, target(scheduler, latents, noise, steps), taught))
    return views
