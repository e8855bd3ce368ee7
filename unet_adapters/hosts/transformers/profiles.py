"""Published diffusion transformers as data: their configs, and how their pipelines add noise and encode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from torch import nn


@dataclass(frozen=True, eq=False)
class TransformerProfile:
    """A published transformer.

    Attributes:
        name: its common name.
        model_class: of diffusers.
        config: arguments of the class that differ from its defaults.
        vae: arguments of its autoencoder that differ from Stable Diffusion's.
        flow: arguments of the flow's scheduler; None: it predicts noise on Stable Diffusion's schedule.
        text_parameters: parameters of its text encoders.
        encoded: what its pipeline's `encode_prompt` returns, by the names of conditions.
    """

    name: str
    model_class: Any
    config: Mapping[str, Any]
    vae: Mapping[str, Any] = field(default_factory=dict)
    flow: Mapping[str, Any] | None = None
    text_parameters: int = 0
    encoded: tuple[str, ...] = ()

    def model(self, device: str | torch.device = "meta", **changes: Any) -> nn.Module:
        """The architecture with random weights, in eval mode and torch's default dtype.

        Args:
            device: "meta" makes a model without memory for its weights, to count or to inspect.
            **changes: entries of the config to replace.
        """
        config = {**self.config, **changes}
        with torch.device(device):
            model: nn.Module = self.model_class(**config)
        return model.eval()


_T5_XXL = 4_762_310_656
_CLIP_L = 123_060_480
_CLIP_BIGG = 694_659_840
_VAE_16 = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}

TRANSFORMER_PROFILES: tuple[TransformerProfile, ...] = (
    TransformerProfile(
        "PixArt-Sigma",
        PixArtTransformer2DModel,
        {"caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False},
        vae={"scaling_factor": 0.13025},
        text_parameters=_T5_XXL,
        encoded=("text", "text_mask", "text", "text_mask"),
    ),
    TransformerProfile(
        "SD3.5-medium",
        SD3Transformer2DModel,
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        vae={**_VAE_16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        flow={"shift": 3.0},
        text_parameters=_T5_XXL + _CLIP_L + _CLIP_BIGG,
        encoded=("text", "text", "pooled", "pooled"),
    ),
    TransformerProfile(
        "Flux",
        FluxTransformer2DModel,
        {"guidance_embeds": True},
        vae={**_VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        flow={"shift": 3.0, "use_dynamic_shifting": True},
        text_parameters=_T5_XXL + _CLIP_L,
        encoded=("text", "pooled", "text"),
    ),
)
