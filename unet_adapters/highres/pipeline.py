"""What large images need to know about a text-to-image pipeline: its geometry, its weights, its prompt encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_adapters.highres.schedule import check_scheduler
from unet_adapters.highres.stages import ProgressiveStage
from unet_adapters.hosts import find_host
from unet_adapters.mounted_layer import MountedLayer

SAFETY_SIDE = 1024
"""Side, in pixels, of the largest image that a safety checker gets."""


def vae_scale_factor(pipe: Any) -> int:
    """Return the number of image pixels along one side of a latent pixel."""
    return int(pipe.vae_scale_factor)


def denoiser(pipe: Any) -> Any:
    """Return the denoising network of a pipeline: its UNet or its transformer."""
    unet = getattr(pipe, "unet", None)
    return pipe.transformer if unet is None else unet


def size_multiple(pipe: Any) -> int:
    """Return what image sides must be multiples of, in pixels, so that latents divide into levels or patches."""
    return vae_scale_factor(pipe) * find_host(pipe).latent_multiple


def native_size(pipe: Any) -> int:
    """Return the side, in pixels, of the images that the model was trained on, according to its config."""
    return find_host(pipe).native_latents * vae_scale_factor(pipe)


def check_largest_size(pipe: Any, size: tuple[int, int]) -> None:
    """Check that the model has positions for an image of (height, width) pixels.

    Raises:
        ValueError: If it does not; the message names the largest side.
    """
    largest = find_host(pipe).largest_latents
    if largest is not None and max(size) > largest * vae_scale_factor(pipe):
        raise ValueError(
            f"Cannot make an image of {size[1]} × {size[0]} pixels: this model has positions for sides of up to "
            f"{largest * vae_scale_factor(pipe):,} pixels. Choose a smaller size."
        )


def timestep_options(pipe: Any, size: tuple[int, int], steps: int) -> dict[str, Any]:
    """Return the arguments of the scheduler's `set_timesteps` for an image of (height, width) pixels."""
    factor = vae_scale_factor(pipe)
    return find_host(pipe).timestep_options(pipe.scheduler, (size[0] // factor, size[1] // factor), steps)


def check_schedules(pipe: Any, steps: int, stages: Sequence[ProgressiveStage]) -> None:
    """Check that the pipeline's scheduler is of the model's kind and reaches the image in every stage.

    See `check_scheduler`.

    Raises:
        ValueError: If it does not in one of them.
    """
    predicts_flow = find_host(pipe).predicts_flow
    for stage in stages:
        options = timestep_options(pipe, stage.size, steps)
        check_scheduler(pipe.scheduler, steps, [stage.strength], options, predicts_flow)


def check_not_offloaded(pipe: Any) -> None:
    """Check that the pipeline's weights stay where they are: offloading moves them when the pipeline itself is called.

    Raises:
        ValueError: If a component is offloaded or spread over devices; the message says how to undo it.
    """
    for name, component in pipe.components.items():
        for module in component.modules() if isinstance(component, nn.Module) else ():
            hooks = getattr(module, "_diffusers_hook", None)
            if hooks is not None and hooks.get_hook("group_offloading") is not None:
                undo = "Load it without group offloading"
            elif hasattr(module, "_hf_hook"):
                undo = "Call pipe.remove_all_hooks()"
            else:
                continue
            raise ValueError(
                f"Cannot generate with this pipeline: its {name} is offloaded, and its weights move between devices. "
                f"{undo}, move the pipeline to its device, and pass memory_budget, which chooses savings that fit."
            )


def blacken_if_unsafe(pipe: Any, pixels: Tensor) -> Tensor:
    """Return an image (height, width, 3), uint8, or a black one if the pipeline's safety checker objects to it.

    A pipeline without a safety checker objects to nothing. The checker sees at most SAFETY_SIDE² pixels; it shrinks
    images to 224² itself.
    """
    checker = getattr(pipe, "safety_checker", None)
    if checker is None:
        return pixels
    weight = next(checker.parameters())
    shrink = min(1.0, SAFETY_SIDE / max(pixels.shape[:2]))
    size = tuple(max(1, round(side * shrink)) for side in pixels.shape[:2])
    image = pixels.permute(2, 0, 1)[None]
    if shrink < 1:
        image = F.interpolate(image, size, mode="bilinear", antialias=True)
    values = (image[0].permute(1, 2, 0).float() / 255).numpy()[None]
    _, unsafe = pipe.run_safety_checker(values, weight.device, weight.dtype)
    return torch.zeros_like(pixels) if unsafe[0] else pixels


def weight_bytes(pipe: Any) -> int:
    """Return the size of all weights of a pipeline in bytes, with the teacher's that mounted adapters keep."""
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    replaced_bytes = sum(
        m.teacher_bytes for network in networks for m in network.modules() if isinstance(m, MountedLayer)
    )
    return replaced_bytes + sum(p.numel() * p.element_size() for network in networks for p in network.parameters())


def guidance_scale(pipe: Any, scale: float | None) -> float:
    """Return `scale`, or the one that a call of the pipeline uses if none is given."""
    return find_host(pipe).guidance_scale(pipe) if scale is None else scale


def uses_guidance(pipe: Any, scale: float) -> bool:
    """Return whether each step needs two predictions: classifier-free guidance with this scale."""
    return scale != 1 and not find_host(pipe).embeds_guidance


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
        guidance: guidance scale, for models that embed it.

    Returns:
        The conditions of the prompt and of the negative prompt, by the names of the host: `text` (1, t, d), `pooled`
        (1, p), and the guidance scale where the model embeds it.
    """
    host = find_host(pipe)
    negatives = None if negative_prompt is None else [negative_prompt]
    positive, negative = host.encode_prompts(pipe, [prompt], negatives)
    embedded = host.guidance_conditions(pipe, guidance)
    return {**positive, **embedded}, {**negative, **embedded}
