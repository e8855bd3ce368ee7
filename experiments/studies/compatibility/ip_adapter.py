"""A tiny IP-Adapter for the teacher, in the published format and through diffusers' own loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging
from torch import Tensor, nn
from transformers import CLIPModel

from experiments.config import FitConfig
from experiments.distill import DistillationContext
from experiments.teacher.objectives import Denoising
from experiments.training import batch_indices

TOKENS = 4  # that one picture becomes
StateDict = dict[str, dict[str, Tensor]]


@torch.no_grad()
def embed(judge: CLIPModel, images: Tensor) -> Tensor:
    """Images (b, 3, s, s) in [-1, 1] of any size -> projected CLIP embeddings (b, d)."""
    side = judge.config.vision_config.image_size
    if images.shape[-1] != side:
        images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    found = judge.get_image_features(pixel_values=images.to(judge.device))
    return found if isinstance(found, Tensor) else found.pooler_output  # the latter since transformers 5


@torch.no_grad()
def fresh(pipe: StableDiffusionPipeline, embeddings: Tensor, states: Tensor) -> StateDict:
    """Weights to start training from, in the published format: a picture's tokens say what its caption would.

    The projection is the least-squares map (with a small ridge) from pictures' embeddings to their
    captions' text states at four places of the second half, where a causal text encoder has read
    the whole caption; keys and values start as those of the text.

    Args:
        pipe: with no IP-Adapter loaded.
        embeddings: (n, e), of the training pictures.
        states: their captions' (n, t, d).
    """
    places = torch.linspace(states.shape[1] // 2, states.shape[1] - 1, TOKENS).long()
    last_norm = [m for m in pipe.text_encoder.modules() if isinstance(m, nn.LayerNorm)][-1]
    wanted = ((states[:, places] - last_norm.bias) / last_norm.weight).flatten(1).double()
    x, y = embeddings.double(), wanted - wanted.mean(0)
    centered = x - x.mean(0)
    gram = centered.T @ centered + 1e-2 * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    slope = torch.linalg.solve(gram, centered.T @ y).T
    image = {
        "proj.weight": slope.float().cpu(),
        "proj.bias": (wanted.mean(0) - slope @ x.mean(0)).float().cpu(),
        "norm.weight": last_norm.weight.detach().clone().cpu(),
        "norm.bias": last_norm.bias.detach().clone().cpu(),
    }
    layers: dict[str, Tensor] = {}
    for number, name in enumerate(cross_attentions(pipe.unet)):
        attn = pipe.unet.get_submodule(name)
        layers[f"{2 * number + 1}.to_k_ip.weight"] = attn.to_k.weight.detach().clone().cpu()
        layers[f"{2 * number + 1}.to_v_ip.weight"] = attn.to_v.weight.detach().clone().cpu()
    return {"image_proj": image, "ip_adapter": layers}


def cross_attentions(unet: UNet2DConditionModel) -> list[str]:
    """Names of the cross-attentions in the order that the published format counts them in."""
    return [name.removesuffix(".processor") for name in unet.attn_processors if ".attn2." in name]


def loaded_weights(unet: UNet2DConditionModel) -> StateDict:
    """The weights of the loaded IP-Adapter, in the published format."""
    projection = unet.encoder_hid_proj.image_projection_layers[0]
    image = {
        "proj.weight": projection.image_embeds.weight,
        "proj.bias": projection.image_embeds.bias,
        "norm.weight": projection.norm.weight,
        "norm.bias": projection.norm.bias,
    }
    layers = {}
    for number, name in enumerate(cross_attentions(unet)):
        processor = unet.get_submodule(name).processor
        layers[f"{2 * number + 1}.to_k_ip.weight"] = processor.to_k_ip[0].weight
        layers[f"{2 * number + 1}.to_v_ip.weight"] = processor.to_v_ip[0].weight
    parts = {"image_proj": image, "ip_adapter": layers}
    return {part: {k: v.detach().clone().cpu() for k, v in weights.items()} for part, weights in parts.items()}


def flat(weights: StateDict) -> dict[str, Tensor]:
    """As one safetensors file holds them: `image_proj.*` and `ip_adapter.*`."""
    return {f"{part}.{name}": value for part, inner in weights.items() for name, value in inner.items()}


def nested(weights: dict[str, Tensor]) -> StateDict:
    """The inverse of `flat`."""
    found: StateDict = {"image_proj": {}, "ip_adapter": {}}
    for key, value in weights.items():
        part, _, name = key.partition(".")
        found[part][name] = value
    return found


@contextmanager
def loaded(pipe: StableDiffusionPipeline, weights: StateDict) -> Iterator[None]:
    """With the IP-Adapter loaded by `pipe.load_ip_adapter` inside, and unloaded on exit.

    The pipeline gets no image encoder: hand it `ip_adapter_image_embeds`. `weights` are copied.
    """
    extractor, verbosity = pipe.feature_extractor, logging.get_verbosity()
    copied = nested({name: value.clone() for name, value in flat(weights).items()})  # the loader takes them as they are
    logging.set_verbosity_error()  # that there is no image encoder is meant
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


class Pictured(nn.Module):
    """A UNet with a loaded IP-Adapter, called like a UNet; its only parameters are the IP-Adapter's."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.image_proj = unet.encoder_hid_proj
        self.ip_adapter = nn.ModuleList(unet.get_submodule(name).processor for name in cross_attentions(unet))
        self.requires_grad_(True)
        self._unet = (unet,)  # a tuple: not a child, so that its weights are not ours to train

    def forward(self, noisy: Tensor, steps: Tensor, conditions: tuple[Tensor, Tensor]) -> Any:
        """`conditions`: text states (b, t, d) and image embeddings (b, d)."""
        text, images = conditions
        return self._unet[0](noisy, steps, text, added_cond_kwargs={"image_embeds": [images[:, None]]})


def objective(unet: UNet2DConditionModel, scheduler: DDIMScheduler) -> nn.Module:
    """The teacher's objective for the loaded IP-Adapter alone; batches as `batches` makes them."""
    return Denoising(Pictured(unet), scheduler)


def batches(
    setting: DistillationContext,
    embeddings: Tensor,
    blank: Tensor,
    config: FitConfig,
    caption_dropout: float,
    image_dropout: float,
) -> Callable[[int], Any]:
    """Step -> (latents, (text states, image embeddings)); a dropped picture is zeros, a caption `blank` (t, d)."""

    def make(step: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        picked = batch_indices(step, config, len(setting.latents))
        no_text, no_image = (torch.rand(len(picked)) < share for share in (caption_dropout, image_dropout))
        states = torch.where(no_text[:, None, None].to(blank.device), blank, setting.text_states[picked])
        return setting.latents[picked], (states, embeddings[picked] * ~no_image[:, None].to(blank.device))

    return make
