"""The Stable Diffusion UNets as data: what they are made of, and how to tell which of them a UNet is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from unet_adapters.checkpoint import fingerprint
from unet_adapters.sites import resolve_unet

Fingerprint = dict[str, dict[str, int]]


@dataclass(frozen=True, eq=False)
class Profile:
    """A published UNet.

    Attributes:
        name: what people call it.
        config: of `UNet2DConditionModel`, where it differs from that class's defaults, and the blocks in any case.
    """

    name: str
    config: Mapping[str, Any]

    @property
    def fingerprint(self) -> Fingerprint:
        """Name -> dim and heads of every site, in the order of `find_sites`; from the config, nothing is built."""
        widths = self.config["block_out_channels"]
        heads = _per_level(self.config["attention_head_dim"], len(widths))  # diffusers' name for the number of heads
        depths = _per_level(self.config.get("transformer_layers_per_block", 1), len(widths))
        layers, last = self.config["layers_per_block"], len(widths) - 1
        down, up = self.config["down_block_types"], self.config["up_block_types"]
        blocks = [(f"down_blocks.{i}", i, layers) for i, kind in enumerate(down) if "CrossAttn" in kind]
        blocks += [(f"up_blocks.{i}", last - i, layers + 1) for i, kind in enumerate(up) if "CrossAttn" in kind]
        return {
            f"{block}.attentions.{i}.transformer_blocks.{j}.attn1": {"dim": widths[level], "heads": heads[level]}
            for block, level, count in [*blocks, ("mid_block", last, 1)]
            for i in range(count)
            for j in range(depths[level])
        }

    @property
    def latent_divisor(self) -> int:
        """The sides of a latent that are multiples of this are halved without rounding on every level."""
        return 1 << (len(self.config["block_out_channels"]) - 1)

    def unet(self, device: str | torch.device = "meta", **changes: Any) -> UNet2DConditionModel:
        """The architecture with random weights, in eval mode and torch's default dtype.

        Args:
            device: "meta" makes a UNet without memory behind it, to count or to look at.
            **changes: entries of the config to replace.
        """
        with torch.device(device):
            return UNet2DConditionModel(**{**self.config, **changes}).eval()


def _per_level(value: Any, levels: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * levels


_SD: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
_SD21: dict[str, Any] = {
    **_SD,
    "sample_size": 96,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
}
_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_REFINER: dict[str, Any] = {
    **_SDXL,
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 4,
    "attention_head_dim": (6, 12, 24, 24),
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
_EMBEDDED: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "block_out_channels": (48, 96),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
    "cross_attention_dim": 128,
    "norm_num_groups": 8,
}

PROFILES: tuple[Profile, ...] = (
    Profile("SD-1.5", _SD),
    Profile("SD-1.5 inpainting", {**_SD, "in_channels": 9}),
    Profile("SD-2.1", _SD21),
    Profile("SDXL base", _SDXL),
    Profile("SDXL refiner", _REFINER),
    Profile("embedded", _EMBEDDED),
)
"""Where two have the same sites (SD-1.5 and its inpainting), the plain one comes first."""


def profile_of(unet_or_pipe: Any) -> Profile | None:
    """The profile whose fingerprint a UNet has; None where it has another.

    Fine-tuned, renamed and merged models have that of their base. Input channels decide between profiles with the same
    sites; a UNet with other channels than any (of an editing model, say) is the first of them.
    """
    unet = resolve_unet(unet_or_pipe)
    here = fingerprint(unet)
    fitting = [profile for profile in PROFILES if profile.fingerprint == here]
    channels = getattr(getattr(unet, "config", None), "in_channels", None)
    return next((p for p in fitting if p.config["in_channels"] == channels), next(iter(fitting), None))


def profile_with(sites: Mapping[str, Mapping[str, int]]) -> Profile | None:
    """The first profile that has all of these sites, by name -> dim and heads; None where there is none."""
    return next((p for p in PROFILES if all(p.fingerprint.get(name) == site for name, site in sites.items())), None)
