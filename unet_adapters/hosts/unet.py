"""UNets of Stable Diffusion 1.5, 2.1 and XL, their ControlNets, and AnimateDiff's UNetMotionModel."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from unet_adapters.hosts.base import TEXT_TOKENS, Conditions, Host, register_host

TIME_IDS = 6  # SDXL's original size, crop and target size, two numbers each; its refiner's five fit as well


@register_host("unet")
class UNetHost(Host):
    """A model whose self-attention is `attn1` of the transformer blocks in its `Transformer2DModel`s."""

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether the model has a `Transformer2DModel`, whatever its class is called."""
        return any(isinstance(module, Transformer2DModel) for module in model.modules())

    def condition_shapes(self, batch: int = 1, text_tokens: int = TEXT_TOKENS) -> dict[str, tuple[int, ...]]:
        """`text`; of SDXL `pooled` and `time_ids`; `timestep_cond` where the config has `time_cond_proj_dim`."""
        config = self.model.config
        shapes: dict[str, tuple[int, ...]] = {"text": (batch, text_tokens, config.cross_attention_dim)}
        if config.addition_embed_type == "text_time":
            # The UNet embeds each time id on its own and appends the embeddings to the pooled text.
            pooled = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
            shapes |= {"pooled": (batch, pooled), "time_ids": (batch, TIME_IDS)}
        if getattr(config, "time_cond_proj_dim", None) is not None:
            shapes["timestep_cond"] = (batch, config.time_cond_proj_dim)
        return shapes

    def forward_arguments(self, conditions: Conditions) -> dict[str, Any]:
        """`encoder_hidden_states`, and `added_cond_kwargs` and `timestep_cond` where there are such conditions."""
        return unet_arguments(conditions)

    def latent_shape(self, size: tuple[int, int], batch: int = 1) -> tuple[int, ...]:
        """(b, c, height, width)."""
        return (batch, self.model.config.in_channels, *size)

    def _noise_arguments(self, noisy: Tensor, timestep: Tensor) -> dict[str, Any]:
        return {"sample": noisy, "timestep": timestep}


def unet_arguments(conditions: Conditions) -> dict[str, Any]:
    """Conditions -> keyword arguments of a UNet or a ControlNet.

    Args:
        conditions: `text` (b, t, d); of SDXL `pooled` (b, p) and `time_ids` (b, 6); and `timestep_cond` (b, g).
    """
    arguments: dict[str, Any] = {"encoder_hidden_states": conditions["text"]}
    if "pooled" in conditions:
        arguments["added_cond_kwargs"] = {
            "text_embeds": conditions["pooled"],
            "time_ids": conditions["time_ids"],
        }
    if "timestep_cond" in conditions:
        arguments["timestep_cond"] = conditions["timestep_cond"]
    return arguments
