"""How fast a UNet runs here, as operations a second: what a plan turns into time."""

from __future__ import annotations

import time
from typing import Any

import torch

from unet_adapters.highres.denoise import Guide
from unet_adapters.highres.plan import foresee_step, latent_unit, pixels_a_place

SIDE = 128  # pixels: a second or so for SD-1.5 on one core


def measure_rate(pipe: Any, side: int = SIDE) -> float:
    """Floating-point operations a second of the UNet at a small size: the faster of two calls."""
    unit = latent_unit(pipe)
    side = max(1, -(-side // unit)) * unit
    flops = foresee_step(pipe, (side, side), (), 1.0).flops
    unet, places = pipe.unet, side // pixels_a_place(pipe)
    latents = torch.randn(1, unet.config.in_channels, places, places).to(unet.device, unet.dtype)
    told = conditions(unet)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        with torch.no_grad():
            float(Guide(told, told).predict(unet, latents, torch.tensor(500)).sum())
        times.append(time.perf_counter() - start)
    return flops / min(times)


def conditions(unet: Any) -> dict[str, torch.Tensor]:
    """Normal numbers in the shapes of what a UNet is told."""
    told = {"text": torch.randn(1, 77, unet.config.cross_attention_dim)}
    if unet.config.addition_embed_type == "text_time":
        width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        told |= {"pooled": torch.randn(1, width), "time_ids": torch.zeros(1, 6)}
    return {name: tensor.to(unet.device, unet.dtype) for name, tensor in told.items()}
