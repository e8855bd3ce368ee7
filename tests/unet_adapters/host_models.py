"""One tiny random model of every kind of host, and how to call it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unet_adapters import MixerAdapter, find_host, find_sites

SIZES = ((8, 12), (12, 8))  # latents; transformers have patches of 2 × 2
TEXT_TOKENS = 5
SHARPENED = (".to_q", ".to_k", ".norm_q", ".norm_k", ".add_q_proj", ".add_k_proj")
"""Weights that are multiplied by 3, so that attention is sharp and a mixer changes the output visibly."""


def unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def pixart(head_dim: int = 8, large: bool = False) -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=head_dim,
        in_channels=4,
        num_layers=2,
        cross_attention_dim=2 * head_dim,
        sample_size=8,
        caption_channels=12,
        norm_num_groups=4,
        use_additional_conditions=large,
    )


def sd3(dual: tuple[int, ...] = (), qk_norm: str | None = None) -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=16,
        dual_attention_layers=dual,
        qk_norm=qk_norm,
    )


def flux(guidance: bool = False) -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance,
    )


def hunyuan_dit() -> nn.Module:
    return HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=4,  # the fewest with a skip connection
        mlp_ratio=2.0,
        cross_attention_dim=12,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=77,
        text_len_t5=256,
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "UNet": unet,
    "PixArt": pixart,
    "PixArt-1024": partial(pixart, 12, True),
    "SD3": sd3,
    "SD3.5 medium": partial(sd3, (0, 1), "rms_norm"),
    "SD3.5 large": partial(sd3, (), "rms_norm"),
    "Flux": flux,
    "Flux guidance": partial(flux, True),
    "HunyuanDiT": hunyuan_dit,
}


@cache
def _original(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        model = MODELS[kind]()
        for name, parameter in model.named_parameters():
            if any(key in name for key in SHARPENED):
                parameter.data.mul_(3)
            elif not parameter.any():
                parameter.data.normal_(std=0.1)
    return model.eval().requires_grad_(False)


def make_model(kind: str) -> Any:
    """A fresh copy of the model of this kind, in eval mode and frozen."""
    return deepcopy(_original(kind))


def run(model: Any, size: tuple[int, int] = SIZES[0]) -> Tensor:
    """A forward pass on fixed inputs, batch 2."""
    return model(**make_inputs(model, size)).sample


def make_inputs(model: Any, size: tuple[int, int] = SIZES[0], seed: int = 2) -> dict[str, Any]:
    """The arguments of a forward pass, batch 2, with five text tokens where the model takes any number."""
    generator = torch.Generator().manual_seed(seed)
    inputs = find_host(model).dummy_inputs(size, batch=2, generator=generator)
    if isinstance(model, HunyuanDiT2DModel):
        return inputs
    text = inputs["encoder_hidden_states"]
    inputs["encoder_hidden_states"] = text[:, :TEXT_TOKENS]
    if "txt_ids" in inputs:
        inputs["txt_ids"] = inputs["txt_ids"][:TEXT_TOKENS]
    return inputs


def disturb(adapter: MixerAdapter) -> MixerAdapter:
    """The adapter with weights that are all off their start."""
    for parameter in adapter.student.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return adapter


def checkpoint_blocks(model: Any) -> None:
    """Turn gradient checkpointing on, by torch's own function for HunyuanDiT, which diffusers cannot checkpoint."""
    if model._supports_gradient_checkpointing:
        model.enable_gradient_checkpointing()
        return
    for name in {site.group for site in find_sites(model)}:
        block = model.get_submodule(name)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
