"""The published Stable Diffusion UNets as data: their configs, and which of them a UNet is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from unet_adapters.hosts.base import Fingerprint, find_host


@dataclass(frozen=True, eq=False)
class UNetProfile:
    """A published UNet.

    Attributes:
        name: its common name.
        config: arguments of `UNet2DConditionModel` that differ from its defaults, and the blocks in any case.
    """

    name: str
    config: Mapping[str, Any]

    @property
    def fingerprint(self) -> Fingerprint:
        """Dim and heads of every site by name, in the order of `find_sites`; computed from the config alone."""
        widths = self.config["block_out_channels"]
        heads = _per_level(self.config["attention_head_dim"], len(widths))  # diffusers' name for the number of heads
        depths = _per_level(self.config.get("transformer_layers_per_block", 1), len(widths))
        layers = self.config["layers_per_block"]
        last = len(widths) - 1
        down = self.config["down_block_types"]
        up = self.config["up_block_types"]
        blocks = [(f"down_blocks.{i}", i, layers) for i, kind in enumerate(down) if "CrossAttn" in kind]
        blocks += [(f"up_blocks.{i}", last - i, layers + 1) for i, kind in enumerate(up) if "CrossAttn" in kind]
        return {
            f"{block}.attentions.{i}.transformer_blocks.{j}.attn1": {"dim": widths[level], "heads": heads[level]}
            for block, level, count in [*blocks, ("mid_block", last, 1)]
            for i in range(count)
            for j in range(depths[level])
        }

    def unet(self, device: str | torch.device = "meta", **changes: Any) -> UNet2DConditionModel:
        """The architecture with random weights, in eval mode and torch's default dtype.

        Args:
            device: "meta" makes a UNet without memory for its weights, to count or to inspect.
            **changes: entries of the config to replace.
        """
        with torch.device(device):
            config = {**self.config, **changes}
            return UNet2DConditionModel(**config).eval()


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
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "transformer_layers_per_block": 2,
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 128,
    "norm_num_groups": 4,
}

PROFILES: tuple[UNetProfile, ...] = (
    UNetProfile("SD-1.5", _SD),
    UNetProfile("SD-1.5 inpainting", {**_SD, "in_channels": 9}),
    UNetProfile("SD-2.1", _SD21),
    UNetProfile("SDXL base", _SDXL),
    UNetProfile("SDXL refiner", _REFINER),
    UNetProfile("embedded", _EMBEDDED),
)
"""Of two profiles with the same sites (SD-1.5 and its inpainting), the plain one comes first."""


def find_profile(pipe_or_unet: Any) -> UNetProfile | None:
    """The profile with the fingerprint of this UNet; None if there is none.

    Fine-tuned, renamed and merged models have that of their base. Input channels decide between profiles with the same
    sites; for a UNet with another number of channels (of an editing model, say) it is the first of them.
    """
    host = find_host(pipe_or_unet)
    fingerprint = host.fingerprint()
    candidates = [profile for profile in PROFILES if profile.fingerprint == fingerprint]
    channels = getattr(getattr(host.model, "config", None), "in_channels", None)
    return next((p for p in candidates if p.config["in_channels"] == channels), next(iter(candidates), None))


def profile_with_sites(sites: Mapping[str, Mapping[str, int]]) -> UNetProfile | None:
    """The first profile that has all of these sites, by name -> dim and heads; None if there is none."""
    return next((p for p in PROFILES if all(p.fingerprint.get(name) == site for name, site in sites.items())), None)
