"""The throughput of a UNet on this machine, with which a plan turns operations into time."""

from __future__ import annotations

import time
from typing import Any

import torch

from unet_adapters.highres.denoising import ClassifierFreeGuidance
from unet_adapters.highres.estimates import estimate_unet_call
from unet_adapters.highres.pipeline import denoiser, size_multiple, vae_scale_factor
from unet_adapters.hosts import find_host

SIDE = 128  # pixels: about a second for SD-1.5 on one core


def measure_throughput(pipe: Any, side: int = SIDE) -> float:
    """Measure the floating-point operations per second of the denoising network, the faster of two calls.

    Args:
        pipe: the pipeline.
        side: of the image in pixels; rounded up to what the model takes, and no more than it has positions for.
    """
    host = find_host(pipe)
    multiple = size_multiple(pipe)
    largest = host.largest_latents
    side = side if largest is None else min(side, largest * vae_scale_factor(pipe))
    side = max(1, -(-side // multiple)) * multiple
    flops = estimate_unet_call(pipe, (side, side), (), 1.0).flops
    network = denoiser(pipe)
    latent_side = side // vae_scale_factor(pipe)
    latents = torch.randn(host.latent_shape((latent_side, latent_side))).to(network.device, network.dtype)
    conditions = host.dummy_conditions()
    guidance = ClassifierFreeGuidance(conditions, conditions)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        with torch.no_grad():
            float(guidance.predict(host, latents, torch.tensor(500)).sum())  # float waits for the GPU
        times.append(time.perf_counter() - start)
    return flops / min(times)
