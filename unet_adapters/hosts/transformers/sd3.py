"""Stable Diffusion 3.5 medium: its second attention, which sees image tokens alone.

The first attention of each block is joint: one softmax over image and text tokens. It is not a site yet, so Stable
Diffusion 3 and 3.5 large, which have no second attention, have no sites.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from unet_adapters.hosts.base import TEXT_TOKENS, Conditions, register_host
from unet_adapters.hosts.transformers.base import PatchTransformerHost


@register_host("sd3")
class SD3Host(PatchTransformerHost):
    """`attn2` of the blocks that have one: queries and keys are RMS-normed per head, no rotary embedding."""

    attention_kwargs = "joint_attention_kwargs"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether it is an `SD3Transformer2DModel`."""
        return isinstance(model, SD3Transformer2DModel)

    def _self_attentions(self) -> Iterator[tuple[str, Any]]:
        for index, block in enumerate(self.model.transformer_blocks):
            if getattr(block, "attn2", None) is not None:
                yield f"transformer_blocks.{index}.attn2", block.attn2

    def condition_shapes(self, batch: int = 1, text_tokens: int = TEXT_TOKENS) -> dict[str, tuple[int, ...]]:
        """`text` and `pooled`."""
        config = self.model.config
        return {
            "text": (batch, text_tokens, config.joint_attention_dim),
            "pooled": (batch, config.pooled_projection_dim),
        }

    def forward_arguments(self, conditions: Conditions) -> dict[str, Any]:
        """`encoder_hidden_states` and `pooled_projections`."""
        return {"encoder_hidden_states": conditions["text"], "pooled_projections": conditions["pooled"]}

    def _noise_arguments(self, noisy: Tensor, timestep: Tensor) -> dict[str, Any]:
        return {"hidden_states": noisy, "timestep": timestep}
