"""UNets of Stable Diffusion 1.5, 2.1 and XL, their ControlNets, and AnimateDiff's UNetMotionModel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unet_adapters.attention import MixerAttention, check_attention
from unet_adapters.hosts.base import GridSource, Host, register_host
from unet_adapters.hosts.calls import TEXT_TOKENS, Conditions
from unet_adapters.hosts.grids import measure_image, pass_grid
from unet_adapters.mounted_layer import MountedLayer
from unet_adapters.sites import Site

LEVEL = re.compile(r"(down_blocks|up_blocks)\.\d+|mid_block")
TIME_IDS = 6  # SDXL's original size, crop and target size, two numbers each; its refiner's five fit as well


@register_host("unet")
class UNetHost(Host):
    """A model whose self-attention is `attn1` of the transformer blocks in its `Transformer2DModel`s."""

    predicts_flow = False

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether the model has a `Transformer2DModel`, whatever its class is called."""
        return any(isinstance(module, Transformer2DModel) for module in model.modules())

    def sites(self) -> list[Site]:
        """`attn1` of each `BasicTransformerBlock` in a `Transformer2DModel`, unless it is cross-attention.

        Motion modules, GLIGEN fusers, cross-attention-only blocks and the VAE are left alone.
        """
        return list(dict.fromkeys(self._sites()))  # a Transformer2DModel may contain another

    def _sites(self) -> Iterator[Site]:
        for prefix, transformer in self._transformers():
            for name, block in transformer.named_modules(prefix=prefix):
                attn = getattr(block, "attn1", None) if isinstance(block, BasicTransformerBlock) else None
                if isinstance(attn, Attention) and not attn.is_cross_attention:
                    site = f"{name}.attn1"
                    level = LEVEL.match(site)
                    group = level[0] if level else site.partition(".attentions.")[0]
                    yield Site(site, int(attn.query_dim), int(attn.heads), group)

    def _transformers(self) -> Iterator[tuple[str, Transformer2DModel]]:
        for name, module in self.model.named_modules():
            if isinstance(module, Transformer2DModel):
                yield name, module

    def mounted_class(self, layer: nn.Module) -> type[MountedLayer] | None:
        """`MixerAttention` for diffusers' own `Attention`."""
        return MixerAttention if type(layer) is Attention else None

    def check_layer(self, site: Site, layer: Any) -> None:
        """See `attention.check_attention`."""
        check_attention(site, layer)

    def attach_grid(self, layers: Iterable[nn.Module]) -> list[RemovableHandle]:
        """Each `Transformer2DModel` around a layer adds the grid to its `cross_attention_kwargs`."""
        receivers = {id(layer) for layer in layers}
        handles = []
        for _, transformer in self._transformers():
            attentions = [module for module in transformer.modules() if isinstance(module, Attention)]
            if any(id(attention) in receivers for attention in attentions):
                handles += pass_grid(transformer, measure_image, "cross_attention_kwargs", attentions)
        return handles

    def grid_source(self, site_name: str) -> GridSource | None:
        """The innermost `Transformer2DModel` around the site."""
        innermost = None
        module: Any = self.model
        parts = site_name.split(".")
        for depth, part in enumerate(parts[:-1], start=1):
            module = getattr(module, part, None)
            if isinstance(module, Transformer2DModel):
                innermost = GridSource(".".join(parts[:depth]), measure_image)
        return innermost

    def tokens_at(self, site: Site, size: tuple[int, int]) -> int | None:
        """Every level halves height and width, rounding up; None if the group is not a level of a UNet."""
        levels = len(getattr(self.model, "down_blocks", ()))
        kind, _, number = site.group.partition(".")
        if not levels or not LEVEL.fullmatch(site.group):
            return None
        halvings = levels - 1
        if kind == "down_blocks":
            halvings = int(number)
        elif kind == "up_blocks":
            halvings = levels - 1 - int(number)
        height, width = size
        for _ in range(halvings):
            height = -(-height // 2)
            width = -(-width // 2)
        return height * width

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

    def encode_prompts(
        self, pipe: Any, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None, *, guided: bool = True
    ) -> tuple[Conditions, Conditions]:
        """`text`, and of SDXL `pooled`, which without a negative prompt guides away from zeros."""
        text, negative_text, *pooled = pipe.encode_prompt(
            list(prompts),
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=None if negative_prompts is None else list(negative_prompts),
        )
        positive = {"text": text, "pooled": pooled[0]} if pooled else {"text": text}
        if not guided:
            return positive, {}
        return positive, {"text": negative_text, "pooled": pooled[1]} if pooled else {"text": negative_text}

    def size_conditions(self, size: tuple[int, int], batch: int = 1) -> dict[str, Tensor]:
        """Of SDXL, `time_ids`: original size, crop and target size, in float32: bfloat16 cannot represent 1,032."""
        if self.model.config.addition_embed_type != "text_time":
            return {}
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=self.device)
        return {"time_ids": ids.repeat(batch, 1)}

    @property
    def latent_multiple(self) -> int:
        """Sides of which every level of the UNet halves exactly."""
        return 1 << (len(self.model.config.block_out_channels) - 1)

    @property
    def embeds_guidance(self) -> bool:
        """Whether the UNet takes the guidance scale as an input, as full LCM models do."""
        return getattr(self.model.config, "time_cond_proj_dim", None) is not None

    def guidance_conditions(self, pipe: Any, scale: float, batch: int = 1) -> dict[str, Tensor]:
        """`timestep_cond`, where the UNet embeds the scale."""
        if not self.embeds_guidance:
            return {}
        scales = torch.full((batch,), scale - 1.0)
        embedding = pipe.get_guidance_scale_embedding(scales, embedding_dim=self.model.config.time_cond_proj_dim)
        return {"timestep_cond": embedding.to(self.device, self.dtype)}

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
