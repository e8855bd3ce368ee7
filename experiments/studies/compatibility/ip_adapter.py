"""A tiny IP-Adapter for the teacher, in the published format and loaded by diffusers itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging
from torch import Tensor, nn
from transformers import CLIPModel

from experiments.config import FitConfig
from experiments.distill import DistillationContext
from experiments.teacher.noise_schedules import NoiseSchedule
from experiments.teacher.objectives import Denoising
from experiments.training import batch_indices

IMAGE_TOKENS = 4
"""Text-like tokens that one image becomes."""

RIDGE = 1e-2
IPAdapterWeights = dict[str, dict[str, Tensor]]
"""The published format: "image_proj" and "ip_adapter", each a state dict."""


@torch.no_grad()
def embed_images(clip: CLIPModel, images: Tensor) -> Tensor:
    """Return the projected CLIP embeddings (b, d) of images (b, 3, s, s) in [-1, 1] of any size."""
    side = clip.config.vision_config.image_size
    if images.shape[-1] != side:
        images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    features = clip.get_image_features(pixel_values=images.to(clip.device))
    return features if isinstance(features, Tensor) else features.pooler_output  # the latter since transformers 5


@torch.no_grad()
def initial_weights(pipe: StableDiffusionPipeline, embeddings: Tensor, text_states: Tensor) -> IPAdapterWeights:
    """Return weights to start training from, in the published format: an image's tokens imitate its caption's.

    The projection is the least-squares map, with a small ridge, from image embeddings to the text states of their
    captions at four tokens of the second half, where a causal text encoder has read the whole caption. Keys and values
    start as those of the text.

    Args:
        pipe: without an IP-Adapter.
        embeddings: of the training images, (n, e).
        text_states: of their captions, (n, t, d).
    """
    tokens = torch.linspace(text_states.shape[1] // 2, text_states.shape[1] - 1, IMAGE_TOKENS).long()
    last_norm = [m for m in pipe.text_encoder.modules() if isinstance(m, nn.LayerNorm)][-1]
    targets = ((text_states[:, tokens] - last_norm.bias) / last_norm.weight).flatten(1).double()
    x = embeddings.double()
    centered = x - x.mean(0)
    ridge = RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    slope = torch.linalg.solve(centered.T @ centered + ridge, centered.T @ (targets - targets.mean(0))).T
    projection = {
        "proj.weight": slope.float().cpu(),
        "proj.bias": (targets.mean(0) - slope @ x.mean(0)).float().cpu(),
        "norm.weight": last_norm.weight.detach().clone().cpu(),
        "norm.bias": last_norm.bias.detach().clone().cpu(),
    }
    layers: dict[str, Tensor] = {}
    for number, name in enumerate(cross_attention_names(pipe.unet)):
        attn = pipe.unet.get_submodule(name)
        layers[f"{2 * number + 1}.to_k_ip.weight"] = attn.to_k.weight.detach().clone().cpu()
        layers[f"{2 * number + 1}.to_v_ip.weight"] = attn.to_v.weight.detach().clone().cpu()
    return {"image_proj": projection, "ip_adapter": layers}


def cross_attention_names(unet: UNet2DConditionModel) -> list[str]:
    """Return the names of the cross-attention layers, in the order in which the published format numbers them."""
    return [name.removesuffix(".processor") for name in unet.attn_processors if ".attn2." in name]


def read_weights(unet: UNet2DConditionModel) -> IPAdapterWeights:
    """Return a copy of the loaded IP-Adapter's weights, in the published format."""
    projection = unet.encoder_hid_proj.image_projection_layers[0]
    image_proj = {
        "proj.weight": projection.image_embeds.weight,
        "proj.bias": projection.image_embeds.bias,
        "norm.weight": projection.norm.weight,
        "norm.bias": projection.norm.bias,
    }
    layers = {}
    for number, name in enumerate(cross_attention_names(unet)):
        processor = unet.get_submodule(name).processor
        layers[f"{2 * number + 1}.to_k_ip.weight"] = processor.to_k_ip[0].weight
        layers[f"{2 * number + 1}.to_v_ip.weight"] = processor.to_v_ip[0].weight
    parts = {"image_proj": image_proj, "ip_adapter": layers}
    return {part: {k: v.detach().clone().cpu() for k, v in weights.items()} for part, weights in parts.items()}


def flatten_weights(weights: IPAdapterWeights) -> dict[str, Tensor]:
    """Return the weights as one safetensors file holds them: `image_proj.*` and `ip_adapter.*`."""
    return {f"{part}.{name}": value for part, inner in weights.items() for name, value in inner.items()}


def unflatten_weights(tensors: dict[str, Tensor]) -> IPAdapterWeights:
    """Return the inverse of `flatten_weights`."""
    weights: IPAdapterWeights = {"image_proj": {}, "ip_adapter": {}}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        weights[part][name] = value
    return weights


@contextmanager
def ip_adapter_loaded(pipe: StableDiffusionPipeline, weights: IPAdapterWeights) -> Iterator[None]:
    """Load an IP-Adapter by `pipe.load_ip_adapter` inside the block, and unload it on exit.

    The pipeline gets no image encoder: pass it `ip_adapter_image_embeds`. The weights are copied.
    """
    extractor = pipe.feature_extractor
    verbosity = logging.get_verbosity()
    copied = unflatten_weights({name: value.clone() for name, value in flatten_weights(weights).items()})
    logging.set_verbosity_error()  # hides the warning about the missing image encoder
    try:
        pipe.load_ip_adapter(copied, subfolder="", weight_name="", image_encoder_folder=None)
    finally:
        logging.set_verbosity(verbosity)
    pipe.unet.requires_grad_(False)
    try:
        yield
    finally:
        pipe.unload_ip_adapter()
        pipe.register_modules(feature_extractor=extractor)


class ImagePromptedUNet(nn.Module):
    """A UNet with a loaded IP-Adapter, called like a UNet; its only parameters are the IP-Adapter's."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.image_proj = unet.encoder_hid_proj
        self.ip_adapter = nn.ModuleList(unet.get_submodule(name).processor for name in cross_attention_names(unet))
        self.requires_grad_(True)
        self._unet = (unet,)  # in a tuple, so that it is no submodule and its weights are not trained

    def forward(self, noisy: Tensor, timesteps: Tensor, conditions: tuple[Tensor, Tensor]) -> Any:
        """Predict from text states (b, t, d) and image embeddings (b, d)."""
        text, images = conditions
        return self._unet[0](noisy, timesteps, text, added_cond_kwargs={"image_embeds": [images[:, None]]})


def ip_adapter_loss(unet: UNet2DConditionModel, schedule: NoiseSchedule) -> nn.Module:
    """Return the teacher's training objective for the loaded IP-Adapter alone; its batches are `ip_adapter_batches`."""
    return Denoising(ImagePromptedUNet(unet), schedule)


def ip_adapter_batches(
    context: DistillationContext,
    embeddings: Tensor,
    empty_caption: Tensor,
    fit: FitConfig,
    caption_dropout: float,
    image_dropout: float,
) -> Callable[[int], Any]:
    """Return a function from a step to its batch: latents and (text states, image embeddings).

    Args:
        context: the teacher's encoded training images.
        embeddings: of these images in the same order, (n, e).
        empty_caption: text states (t, d) of the empty caption.
        fit: its seed and batch size.
        caption_dropout: share of captions that are replaced by the empty one.
        image_dropout: share of embeddings that are replaced by zeros.
    """

    def draw(step: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        indices = batch_indices(step, fit, len(context.latents))
        without_text = torch.rand(len(indices)) < caption_dropout
        without_image = torch.rand(len(indices)) < image_dropout
        device = empty_caption.device
        text = torch.where(without_text[:, None, None].to(device), empty_caption, context.text_states[indices])
        return context.latents[indices], (text, embeddings[indices] * ~without_image[:, None].to(device))

    return draw
