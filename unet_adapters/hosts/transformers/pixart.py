"""PixArt-α and PixArt-Σ: plain self-attention over image tokens; the text comes in through cross-attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from unet_adapters.hosts.base import register_host
from unet_adapters.hosts.calls import Conditions, default_argument
from unet_adapters.hosts.transformers.base import PatchTransformerHost

TEXT_TOKENS = 300  # of PixArt-Σ's captions; α's have 120


@register_host("pixart")
class PixArtHost(PatchTransformerHost):
    """`attn1` of every block: no rotary embedding, no query or key norms."""

    attention_kwargs = "cross_attention_kwargs"
    predicts_flow = False

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

    def encode_prompts(
        self, pipe: Any, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None, *, guided: bool = True
    ) -> tuple[Conditions, Conditions]:
        """`text`, and `text_mask` (b, t), 0 for padding; as long as the tokenizer allows, where that is shorter."""
        text, mask, negative_text, negative_mask = pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=guided,
            negative_prompt="" if negative_prompts is None else list(negative_prompts),
            num_images_per_prompt=1,
            device=self.device,
            max_sequence_length=_text_length(pipe),
            clean_caption=default_argument(pipe, "clean_caption", False),  # its call cleans, encode_prompt does not
        )
        positive = {"text": text, "text_mask": mask}
        return positive, {"text": negative_text, "text_mask": negative_mask} if guided else {}

    def size_conditions(self, size: tuple[int, int], batch: int = 1) -> dict[str, Tensor]:
        """`resolution` and `aspect_ratio`, for models that have them, in float32."""
        if not self.model.use_additional_conditions:
            return {}
        resolution = torch.tensor([size], dtype=torch.float32, device=self.device).repeat(batch, 1)
        return {"resolution": resolution, "aspect_ratio": resolution[:, :1] / resolution[:, 1:]}

    def sampling_options(self, pipe: Any) -> dict[str, Any]:
        """See `DenoiserCalls.sampling_options`."""
        return {**super().sampling_options(pipe), "max_sequence_length": _text_length(pipe)}

    def _read_output(self, output: Tensor, noisy: Tensor) -> Tensor:
        """The first half of the channels of models that also predict variances."""
        return output[:, : noisy.shape[1]]

    def _noise_arguments(self, noisy: Tensor, timestep: Tensor) -> dict[str, Any]:
        return {"hidden_states": noisy, "timestep": timestep}


def _text_length(pipe: Any) -> int:
    """Tokens of a caption: the pipeline's own number, or as many as its tokenizer allows where these are fewer."""
    default: int = default_argument(pipe.encode_prompt, "max_sequence_length", TEXT_TOKENS)
    tokenizer = getattr(pipe, "tokenizer", None)
    return default if tokenizer is None else min(default, tokenizer.model_max_length)
