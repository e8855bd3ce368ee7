"""Reference images and the images that the models generate from their captions, edges or embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPModel

from experiments.data import batch, open_dataset
from experiments.studies.compatibility.config import SamplingConfig
from experiments.studies.compatibility.controlnet import detect_edges
from experiments.studies.compatibility.ip_adapter import IPAdapterWeights, embed_images, ip_adapter_loaded
from unet_adapters import MixerAdapter

VARIATION = 100_000  # selects a background, position and scale that no training used
CHUNK = 16
"""Images per call."""

CallArguments = Callable[[slice], dict[str, Any]]
"""Takes which images a call generates and returns further arguments of that call."""


@dataclass(frozen=True)
class ReferenceImages:
    """Real images of a split, to be generated again from their captions, edges or embeddings.

    Attributes:
        split: "train" or "held_out".
        size: side in pixels.
        images: (n, 3, size, size) in [-1, 1].
        captions: n captions.
    """

    split: str
    size: int
    images: Tensor
    captions: list[str]


def load_references(data: str, split: str, size: int, images: int) -> ReferenceImages:
    """Load images that are spread evenly over a split: the same drawings at every size, in a setting of their own."""
    items = open_dataset(data, split=split)
    indices = torch.linspace(0, len(items) - 1, images).long().tolist()
    pixels, captions = batch(items, indices, size, [VARIATION] * images)
    return ReferenceImages(split, size, pixels, captions)


@torch.no_grad()
def reconstruct(pipe: StableDiffusionPipeline, images: Tensor) -> Tensor:
    """Encode and decode images by the autoencoder: no generated image can be expected to come closer to them."""
    parts = [pipe.vae.decode(pipe.vae.encode(x.to(pipe.device)).latent_dist.mean).sample for x in images.split(CHUNK)]
    return torch.cat(parts).clamp(-1, 1).cpu()


def controlnet_pipeline(
    pipe: StableDiffusionPipeline, controlnet: ControlNetModel
) -> StableDiffusionControlNetPipeline:
    """Return diffusers' ControlNet pipeline that shares all networks with `pipe`."""
    parts = {**pipe.components, "controlnet": controlnet}
    controlled = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    controlled.set_progress_bar_config(disable=True)
    return controlled


@torch.no_grad()
def generate_images(
    pipe: Any,
    captions: list[str],
    size: int,
    config: SamplingConfig,
    arguments: CallArguments | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Generate one image per caption, with the seed `config.seed` + k for caption k.

    Args:
        pipe: a text-to-image or ControlNet pipeline.
        captions: n captions.
        size: side in pixels.
        config: steps, guidance and seed.
        arguments: further arguments of each call.
        chunk: images per call.

    Returns:
        (n, 3, size, size) in [-1, 1], rounded to 8-bit colors.
    """
    parts = []
    for start in range(0, len(captions), chunk):
        part = slice(start, min(start + chunk, len(captions)))
        images = pipe(
            captions[part],
            height=size,
            width=size,
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            generator=[torch.Generator().manual_seed(config.seed + k) for k in range(part.start, part.stop)],
            output_type="pt",
            **(arguments(part) if arguments else {}),
        ).images
        parts.append((images.cpu().float() * 255).round() / 127.5 - 1)
    return torch.cat(parts)


def edge_arguments(edges: Tensor) -> CallArguments:
    """Return the ControlNet pipeline's arguments for edge maps (n, 1, h, w)."""
    return lambda part: {"image": edges[part].expand(-1, 3, -1, -1)}


def image_prompt_arguments(embeddings: Tensor) -> CallArguments:
    """Return a pipeline's arguments for image embeddings (n, d).

    The unguided half of a call gets zeros, as in training. A call must generate a single image: diffusers repeats the
    embeddings for every prompt of a call, so that each prompt would silently see all of them.
    """

    def for_part(part: slice) -> dict[str, Any]:
        selected = embeddings[part, None]
        if len(selected) != 1:
            raise ValueError(
                f"Cannot generate from {len(selected)} embeddings in one IP-Adapter call: expected one. Pass chunk=1."
            )
        return {"ip_adapter_image_embeds": [torch.cat([torch.zeros_like(selected), selected])]}

    return for_part


def check_unmounting(
    pipe: StableDiffusionPipeline,
    adapter: MixerAdapter,
    controlnet: ControlNetModel,
    weights: IPAdapterWeights,
    clip: CLIPModel,
    references: ReferenceImages,
) -> dict[str, bool]:
    """Check that unmounting the student and unloading the parts gives bitwise the stock latents again.

    Args:
        pipe: the teacher's pipeline.
        adapter: the student.
        controlnet: the ControlNet.
        weights: of the IP-Adapter.
        clip: embeds images for the IP-Adapter.
        references: the first of them is the condition.

    Returns:
        Statement -> whether it holds.
    """
    first = slice(0, 1)
    image = references.images[first]
    controlled = controlnet_pipeline(pipe, controlnet)
    arguments = {
        **edge_arguments(detect_edges(image))(first),
        **image_prompt_arguments(embed_images(clip, image))(first),
    }

    @torch.no_grad()
    def latents(pipeline: Any, **extra: Any) -> Tensor:
        return pipeline(
            references.captions[first],
            generator=[torch.Generator().manual_seed(0)],
            height=references.size,
            width=references.size,
            num_inference_steps=3,
            output_type="latent",
            **extra,
        ).images

    stock = latents(pipe)
    with ip_adapter_loaded(pipe, weights):
        before = latents(controlled, **arguments)
        with adapter.mounted():
            mounted = latents(controlled, **arguments)
        after = latents(controlled, **arguments)
    return {
        "mounting changes the result": not torch.equal(before, mounted),
        "unmounting restores the stock result, with ControlNet and IP-Adapter loaded": torch.equal(before, after),
        "unloading the IP-Adapter as well restores the plain teacher's result": torch.equal(stock, latents(pipe)),
    }
