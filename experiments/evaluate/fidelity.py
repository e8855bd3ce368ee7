"""How close a student stays to its teacher and to the truth: by size and shape, by timestep, by site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from experiments.config import EvaluationConfig
from experiments.data import batch
from experiments.distill.context import DistillationContext
from experiments.distill.loss import autocast
from experiments.teacher.teacher import Batch
from unet_adapters import MixerAdapter
from unet_adapters.capture import capture_outputs
from unet_adapters.hosts import find_host

Row = dict[str, Any]


@dataclass(frozen=True)
class View:
    """Noisy held-out pictures at one timestep, and what the teacher makes of them.

    Attributes:
        batch: their conditions.
        noisy, truth, taught: latents (b, c, h, w), the true target and the teacher's prediction.
        steps: the timestep (b,).
        sites: the outputs (b, l, d) of the teacher's self-attention layers, by name, where they are compared.
    """

    batch: Batch
    noisy: Tensor
    steps: Tensor
    truth: Tensor
    taught: Tensor
    sites: Mapping[str, Tensor]


@torch.no_grad()
def agreement(setting: DistillationContext, adapter: MixerAdapter, config: EvaluationConfig) -> dict[str, list[Row]]:
    """Errors of the student on held-out pictures rendered at each size and shape; the same noise for every variant.

    All are means over pictures and elements:

        fidelity: a row a size and shape, as means over timesteps too.
            error_to_teacher: squared difference of the two predictions;
            relative_error_to_teacher: that over the mean square of the teacher's prediction;
            error_to_truth, teacher_error_to_truth: squared error against the true noise (or velocity);
            error_ratio: the first of these over the second; 1 means as good as the teacher.
        timesteps: a row a size, shape and timestep; its two errors to the teacher.
        sites: at `site_sizes`, a row a self-attention layer, replaced or not, in the flow's order: the squared
            difference of its outputs, each network in its own flow, over the teacher's mean square, both as means over
            timesteps.

    Costs a forward of the student a size and timestep; the teacher's are kept for the next variant, and with them, at
    `site_sizes`, the outputs of all its self-attention layers at all timesteps.
    """
    found: dict[str, list[Row]] = {"fidelity": [], "timesteps": [], "sites": []}
    for height, width in config.extents:
        views = teacher_views(setting, height, width, config)
        errors, sites = [], []
        for view in views:
            with adapter.mounted(), autocast(setting.teacher), capture_outputs(setting.pipe.unet, view.sites) as seen:
                learned = setting.teacher.predict(view.noisy, view.steps, view.batch)
            pairs = ((learned, view.taught), (view.taught, 0), (learned, view.truth), (view.taught, view.truth))
            errors.append(torch.stack([_square(a, b) for a, b in pairs]))
            sites.append([torch.stack([_square(seen[n], y), _square(y, 0)]) for n, y in view.sites.items()])
        place = {"height": height, "width": width}
        found["fidelity"].append(_whole(errors, config.images_at(height, width), place))
        found["timesteps"] += [
            {**place, "timestep": time, "error_to_teacher": apart, "relative_error_to_teacher": apart / power}
            for time, (apart, power, *_) in zip(config.timesteps, (e.tolist() for e in errors), strict=True)
        ]
        for name, parts in zip(views[0].sites, zip(*sites, strict=True), strict=True):
            apart, power = torch.stack(parts).sum(0).tolist()
            found["sites"].append({"site": name, **place, "relative_error": apart / power})
    return found


def _square(a: Tensor, b: Tensor | int) -> Tensor:
    return (a - b).double().square().mean().cpu()


def _whole(errors: list[Tensor], images: int, place: Row) -> Row:
    apart, power, student, teacher = torch.stack(errors).mean(0).tolist()
    return {
        "size": max(place.values()),
        **place,
        "images": images,
        "error_to_teacher": apart,
        "relative_error_to_teacher": apart / power,
        "error_to_truth": student,
        "teacher_error_to_truth": teacher,
        "error_ratio": student / teacher,
    }


@lru_cache(maxsize=16)
@torch.no_grad()
def teacher_views(setting: DistillationContext, height: int, width: int, config: EvaluationConfig) -> tuple[View, ...]:
    """A view for each timestep; kept for the next variant. The UNet must be as the teacher has it: nothing mounted."""
    count, teacher = config.images_at(height, width), setting.teacher
    indices = torch.linspace(0, len(setting.held_out) - 1, count).long().tolist()
    encoded = teacher.encode(*batch(setting.held_out, indices, (height, width), [0] * count))
    latents, draw = encoded["latents"], torch.Generator().manual_seed(config.seed)
    names = [site.name for site in find_host(teacher.unet).sites()] if height == width in config.site_sizes else []
    views = []
    for time in config.timesteps:
        noise = torch.randn(latents.shape, generator=draw).to(latents)
        steps = torch.full((count,), time, device=latents.device)
        noisy = teacher.scheduler.add_noise(latents, noise, steps)
        with autocast(teacher), capture_outputs(teacher.unet, names) as seen:
            taught = teacher.predict(noisy, steps, encoded)
        views.append(View(encoded, noisy, steps, teacher.target(latents, noise, steps), taught, dict(seen)))
    return tuple(views)
