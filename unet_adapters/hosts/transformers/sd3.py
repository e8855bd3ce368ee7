"""Stable Diffusion 3 and 3.5: joint attention over image and text; 3.5 medium has a second one over the image alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from unet_adapters.attention import MixerAttention, check_attention
from unet_adapters.hosts.base import register_host
from unet_adapters.hosts.calls import Conditions
from unet_adapters.hosts.transformers.base import PatchTransformerHost
from unet_adapters.hosts.transformers.joint_attention import JointMixerAttention, check_joint_attention
from unet_adapters.mounted_layer import MountedLayer
from unet_adapters.sites import Site

TEXT_TOKENS = 77 + 256  # of CLIP and of T5


@register_host("sd3")
class SD3Host(PatchTransformerHost):
    """`attn` of every block, which sees image and text, and `attn2` of the blocks that have one, which sees the image.

    3.5 norms queries and keys per head. No rotary embedding.
    """

    attention_kwargs = "joint_attention_kwargs"
    predicts_flow = True

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether it is an `SD3Transformer2DModel`."""
        return isinstance(model, SD3Transformer2DModel)

    def _self_attentions(self) -> Iterator[tuple[str, Any]]:
        for index, block in enumerate(self.model.transformer_blocks):
            yield f"transformer_blocks.{index}.attn", block.attn
            if getattr(block, "attn2", None) is not None:
                yield f"transformer_blocks.{index}.attn2", block.attn2

    def mounted_class(self, layer: nn.Module) -> type[MountedLayer] | None:
        """`JointMixerAttention` where there are projections for text."""
        if type(layer) is not Attention:
            return None
        return MixerAttention if layer.added_kv_proj_dim is None else JointMixerAttention

    def check_layer(self, site: Site, layer: Any) -> None:
        """See `check_joint_attention` and `attention.check_attention`."""
        if site.text:
            check_joint_attention(site, layer)
        else:
            check_attention(site, layer)

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

    def encode_prompts(
        self, pipe: Any, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None, *, guided: bool = True
    ) -> tuple[Conditions, Conditions]:
        """`text` and `pooled`."""
        text, negative_text, pooled, negative_pooled = pipe.encode_prompt(
            list(prompts),
            None,
            None,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=None if negative_prompts is None else list(negative_prompts),
        )
        return {"text": text, "pooled": pooled}, {"text": negative_text, "pooled": negative_pooled} if guided else {}

    @property
    def largest_latents(self) -> int:
        """The table of positions has this side."""
        return int(self.model.config.pos_embed_max_size * self.model.config.patch_size)

    def _noise_arguments(self, noisy: Tensor, timestep: Tensor) -> dict[str, Any]:
        return {"hidden_states": noisy, "timestep": timestep}
