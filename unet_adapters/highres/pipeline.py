"""What large images need to know about a Stable Diffusion pipeline: its geometry, its weights, its prompt encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def vae_scale_factor(pipe: Any) -> int:
    """Return the number of image pixels along one side of a latent pixel."""
    return int(pipe.vae_scale_factor)


def size_multiple(pipe: Any) -> int:
    """Return what image sides must be multiples of, in pixels, so that every level of the UNet halves exactly."""
    return vae_scale_factor(pipe) << (len(pipe.unet.config.block_out_channels) - 1)


def native_size(pipe: Any) -> int:
    """Return the side, in pixels, of the images that the model was trained on, according to its UNet's config."""
    return int(pipe.unet.config.sample_size) * vae_scale_factor(pipe)


def weight_bytes(pipe: Any) -> int:
    """Return the size of all weights of a pipeline in bytes."""
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return sum(p.numel() * p.element_size() for network in networks for p in network.parameters())


@torch.no_grad()
def encode_prompts(pipe: Any, prompt: str, negative_prompt: str) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Encode a prompt and a negative prompt with the pipeline's own text encoders.

    Returns:
        The conditions of the prompt and of the negative prompt: `text` (1, t, d) and, for SDXL, `pooled` (1, p).
    """
    encoded = pipe.encode_prompt(
        prompt,
        device=pipe.unet.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=negative_prompt,
    )
    if len(encoded) == 2:
        return {"text": encoded[0]}, {"text": encoded[1]}
    return {"text": encoded[0], "pooled": encoded[2]}, {"text": encoded[1], "pooled": encoded[3]}
