"""PixArt-α and PixArt-Σ: plain self-attention over image tokens; the text comes in through cross-attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from unet_adapters.hosts.base import TEXT_TOKENS, Conditions, register_host
from unet_adapters.hosts.transformers.base import PatchTransformerHost


@register_host("pixart")
class PixArtHost(PatchTransformerHost):
    """`attn1` of every block: no rotary embedding, no query or key norms."""

    attention_kwargs = "cross_attention_kwargs"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether it is a `PixArtTransformer2DModel`."""
        return isinstance(model, PixArtTransformer2DModel)

    def _self_attentions(self) -> Iterator[tuple[str, Any]]:
        for index, block in enumerate(self.model.transformer_blocks):
            yield f"transformer_blocks.{index}.attn1", block.attn1

    def condition_shapes(self, batch: int = 1, text_tokens: int = TEXT_TOKENS) -> dict[str, tuple[int, ...]]:
        """`text`; of models for 1,024 pixels and more also `resolution` (b, 2) and `aspect_ratio` (b, 1)."""
        config = self.model.config
        width = config.caption_channels or config.cross_attention_dim
        shapes: dict[str, tuple[int, ...]] = {"text": (batch, text_tokens, width)}
        if self.model.use_additional_conditions:
            shapes |= {"resolution": (batch, 2), "aspect_ratio": (batch, 1)}
        return shapes

    def forward_arguments(self, conditions: Conditions) -> dict[str, Any]:
        """`encoder_hidden_states`, `added_cond_kwargs`, and `encoder_attention_mask` for the condition `text_mask`."""
        names = ("resolution", "aspect_ratio")
        return {
            "encoder_hidden_states": conditions["text"],
            "encoder_attention_mask": conditions.get("text_mask"),
            "added_cond_kwargs": {name: conditions.get(name) for name in names},
        }

    def _noise_arguments(self, noisy: Tensor, timestep: Tensor) -> dict[str, Any]:
        return {"hidden_states": noisy, "timestep": timestep}
