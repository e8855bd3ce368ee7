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


def has_embedded_guidance(pipe: Any) -> bool:
    """Return whether the UNet takes the guidance scale as an input, as full LCM models do."""
    return getattr(pipe.unet.config, "time_cond_proj_dim", None) is not None


def uses_guidance(pipe: Any, scale: float) -> bool:
    """Return whether each step needs two predictions: classifier-free guidance with this scale."""
    return scale != 1 and not has_embedded_guidance(pipe)


@torch.no_grad()
def encode_prompts(
    pipe: Any, prompt: str, negative_prompt: str | None, guidance: float
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Encode a prompt and a negative prompt with the pipeline's own text encoders.

    Args:
        pipe: the pipeline.
        prompt: what the image shows.
        negative_prompt: what it does not show; None: what the pipeline uses if none is given, which is the empty prompt
            or, for SDXL, zeros.
        guidance: guidance scale, for UNets that embed it.

    Returns:
        The conditions of the prompt and of the negative prompt: `text` (1, t, d); for SDXL `pooled` (1, p); for UNets
        that embed the guidance scale `timestep_cond` (1, g).
    """
    encoded = pipe.encode_prompt(
        prompt,
        device=pipe.unet.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=negative_prompt,
    )
    positive = {"text": encoded[0]}
    negative = {"text": encoded[1]}
    if len(encoded) == 4:
        positive["pooled"] = encoded[2]
        negative["pooled"] = encoded[3]
    if has_embedded_guidance(pipe):
        scale = torch.tensor([guidance - 1.0])
        embedding = pipe.get_guidance_scale_embedding(scale, embedding_dim=pipe.unet.config.time_cond_proj_dim)
        positive["timestep_cond"] = embedding.to(pipe.unet.device, pipe.unet.dtype)
        negative["timestep_cond"] = positive["timestep_cond"]
    return positive, negative
