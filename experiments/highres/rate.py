"""How fast a UNet runs here, as operations a second: what a plan turns into time."""

from __future__ import annotations

import time
from typing import Any

import torch

from unet_adapters.highres.denoise import Guide
from unet_adapters.highres.plan import foresee_step, latent_unit, pixels_a_place
from unet_adapters.hosts import find_host

SIDE = 128  # pixels: a second or so for SD-1.5 on one core


def measure_rate(pipe: Any, side: int = SIDE) -> float:
    """Floating-point operations a second of the UNet at a small size: the faster of two calls."""
    unit = latent_unit(pipe)
    side = max(1, -(-side // unit)) * unit
    flops = foresee_step(pipe, (side, side), (), 1.0).flops
    unet, places = pipe.unet, side // pixels_a_place(pipe)
    latents = torch.randn(1, unet.config.in_channels, places, places).to(unet.device, unet.dtype)
    conditions = find_host(unet).dummy_conditions()
    times = []
    for _ in range(2):
        start = time.perf_counter()
        with torch.no_grad():
            float(Guide(conditions, conditions).predict(unet, latents, torch.tensor(500)).sum())
        times.append(time.perf_counter() - start)
    return flops / min(times)
