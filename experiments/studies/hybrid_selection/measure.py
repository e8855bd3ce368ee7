"""The two measurements of a selection: how far a student is from its teacher, and how long each site takes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from experiments.bench.attention_layer import BATCH, STOCK
from experiments.core.timing import time_interleaved
from experiments.distill import DistillationContext
from experiments.metrics.inputs.predictions import average_errors, noisy_images, prediction_errors
from experiments.studies.hybrid_selection.config import HybridConfig
from experiments.studies.hybrid_selection.students import combine_students
from unet_adapters import MixerAdapter
from unet_adapters.capture import capture_sites, replay
from unet_adapters.hosts import find_host

SECONDS_PER_LAYER = 10
"""No turn of a measurement starts after this many seconds for each layer that takes part."""


class SizeTimes(BaseModel):
    """Times at one image size, of a batch of 2 without gradients.

    Attributes:
        tokens: of each site, in the order in which the model calls them.
        seconds: medians; by mixer, and for `STOCK`, of each site.
        forward: median of a forward pass of the stock model.
    """

    tokens: dict[str, int]
    seconds: dict[str, dict[str, float]]
    forward: float

    @property
    def rest(self) -> float:
        """Seconds of a forward pass outside the sites."""
        return max(0.0, self.forward - sum(self.seconds[STOCK].values()))


def measure_errors(
    context: DistillationContext, config: HybridConfig, adapter: MixerAdapter, size: int
) -> tuple[float, ...]:
    """Measure a student's relative error on held-out images; nothing may be mounted.

    Args:
        context: the teacher and its held-out images.
        config: its evaluation.
        adapter: the student; sites that it does not have are the teacher's.
        size: side of the images in pixels.

    Returns:
        For each image, the mean over timesteps of the squared difference of the two predictions, over the teacher's
        mean square on all images. The mean is the `relative_error_to_teacher` of the metric `fidelity`.

    Cost: a forward pass of the student for each timestep and batch of images.
    """
    plan = config.evaluation
    images = noisy_images(context, config.data, size, size, "held_out", plan, config.seed)
    errors = average_errors(prediction_errors(images, adapter, plan.timesteps))
    return tuple((errors.by_image / errors.teacher_power).tolist())


@torch.no_grad()
def measure_times(
    context: DistillationContext, config: HybridConfig, students: Mapping[str, MixerAdapter], size: int
) -> SizeTimes:
    """Time the layer of every site, with stock attention and with each mixer, in alternation on the same tokens.

    Sites of one width, number of heads and number of tokens share a measurement.

    Args:
        context: the teacher.
        config: the number of turns.
        students: by mixer, on all sites.
        size: side of the image in pixels.
    """
    unet = context.teacher.denoiser
    host = find_host(context.pipe)
    device = str(context.teacher.device)
    latent_side = size // host.vae_scale_factor
    inputs = host.dummy_inputs((latent_side, latent_side), BATCH, torch.Generator().manual_seed(0))
    sites = host.sites()
    models: dict[str, nn.Module] = {STOCK: unet}
    models |= {name: _mounted_copy(unet, name, student) for name, student in students.items()}
    with capture_sites(unet, [site.name for site in sites]) as calls:
        unet(**inputs)
    tokens = {name: call.input.shape[1] for name, call in calls.items()}
    by_shape: dict[tuple[int, int, int], dict[str, float]] = {}
    for site in sites:
        shape = (site.dim, site.heads, tokens[site.name])
        if shape not in by_shape:
            layers = {name: partial(replay, model, site.name, calls[site.name]) for name, model in models.items()}
            by_shape[shape] = _median_seconds(layers, config.repeats, device)
    forward = _median_seconds({"forward": partial(_call, unet, inputs)}, config.repeats, device)["forward"]
    seconds = {
        name: {site.name: by_shape[site.dim, site.heads, tokens[site.name]][name] for site in sites} for name in models
    }
    return SizeTimes(tokens=tokens, seconds=seconds, forward=forward)


def _mounted_copy(unet: nn.Module, mixer: str, student: MixerAdapter) -> nn.Module:
    """Return the UNet with a mixer at all sites; everything that is not replaced shares its weights with the original.

    The timed copy has the student's projections, as the adapter that is written has.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    model = copy.deepcopy(unet, shared)
    assignment = {site.name: mixer for site in student.sites}
    combine_students({mixer: student}, assignment, find_host(model)).mount()
    return model


def _call(unet: nn.Module, inputs: dict[str, Any]) -> Any:
    return unet(**inputs)


def _median_seconds(functions: dict[str, Any], repeats: int, device: str) -> dict[str, float]:
    times = time_interleaved(
        functions, repeats, warmup=1, max_seconds=SECONDS_PER_LAYER * len(functions), device=device
    )
    return {name: median(values) for name, values in times.items()}
