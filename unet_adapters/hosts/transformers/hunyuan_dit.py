"""HunyuanDiT: self-attention over image tokens with norms of queries and keys per head and rotary embeddings.

Text comes in through cross-attention. The model's blocks pass nothing to their attention layers but the rotary
embedding, which therefore carries the size of the image:

    model       --hook-->  cos, sin (height·width, k)  ->  (height, width, k)
    attention   --hook-->  cos, sin (height·width, k), and mixer_grid=(height, width) if a mixer is mounted
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from diffusers import HunyuanDiT2DModel
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mixers.context import MixingContext, Rotation
from unet_adapters.attention import MountedAttention, check_attention, check_grid, view_teacher
from unet_adapters.hosts.base import register_host
from unet_adapters.hosts.calls import TEXT_TOKENS, Conditions
from unet_adapters.hosts.grids import HookArguments
from unet_adapters.hosts.transformers.base import PatchTransformerHost
from unet_adapters.layer_projections import LayerProjections
from unet_adapters.mounted_layer import GRID_ARGUMENT, GridSize, MountedLayer, stock_processor
from unet_adapters.padding import find_visible
from unet_adapters.sites import Site

ROTARY_ARGUMENT = "image_rotary_emb"
ROTARY_POSITION = 8  # among the positional arguments of the model's forward
BASE_LATENTS = 64  # side of the latents that rotary positions are scaled to: those of 512 pixels
ORIGINAL_SIZE = (1024, 1024)  # what HunyuanDiTPipeline passes as the original size of every image

UNFUSED: dict[type, type] = {stock.FusedHunyuanAttnProcessor2_0: stock.HunyuanAttnProcessor2_0}


class HunyuanDispatch:
    """The processor of a mounted self-attention: stateless."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        mixer_grid: GridSize | None = None,
    ) -> Tensor:
        """Mix image tokens (b, l, d) -> the same shape.

        Raises:
            ValueError: there are encoder_hidden_states; the mask is not one of padding; the stock processor is not a
                supported one; or the tokens are not those of the grid.
        """
        if encoder_hidden_states is not None:
            raise ValueError(
                "self-attention with a mounted mixer got encoder_hidden_states: call it with image tokens alone"
            )
        processor = stock_processor(attn)
        attn.require_supported(processor)
        batch, length, _ = hidden_states.shape
        if length < attn.mixer_from:
            teacher, processor = view_teacher(attn, processor, hidden_states, UNFUSED)
            output: Tensor = processor(
                teacher, hidden_states, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb
            )
            return output
        check_grid(length, mixer_grid)
        rotation = None
        if image_rotary_emb is not None:
            cos, sin = image_rotary_emb
            rotation = Rotation(cos.expand(length, -1), sin.expand(length, -1))  # one for all tokens broadcasts
        context = MixingContext(rotation=rotation, visible=find_visible(attention_mask, batch, length))
        mixed: Tensor = attn.mixer(hidden_states, grid=mixer_grid, projections=LayerProjections(attn), context=context)
        return mixed


class HunyuanMixerAttention(MountedAttention):
    """An `Attention` that rotates queries and keys; made only by `attn.__class__ = HunyuanMixerAttention`."""

    dispatcher = HunyuanDispatch()
    supported_processors = frozenset({stock.HunyuanAttnProcessor2_0, stock.FusedHunyuanAttnProcessor2_0})
    fused_processors = frozenset(UNFUSED)


@register_host("hunyuan_dit")
class HunyuanDiTHost(PatchTransformerHost):
    """`attn1` of every block."""

    rotary = True
    predicts_flow = False

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether it is a `HunyuanDiT2DModel`."""
        return isinstance(model, HunyuanDiT2DModel)

    def _self_attentions(self) -> Iterator[tuple[str, Any]]:
        for index, block in enumerate(self.model.blocks):
            yield f"blocks.{index}.attn1", block.attn1

    def mounted_class(self, layer: nn.Module) -> type[MountedLayer] | None:
        """`HunyuanMixerAttention` for diffusers' own `Attention`."""
        return HunyuanMixerAttention if type(layer) is Attention else None

    def check_layer(self, site: Site, layer: Any) -> None:
        """See `attention.check_attention`.

        Raises:
            ValueError: the layer also norms its input, adds its input to its output, or rescales, which no HunyuanDiT
                does.
        """
        check_attention(site, layer)
        normed = layer.spatial_norm is not None or layer.group_norm is not None
        if normed or layer.residual_connection or layer.rescale_output_factor != 1:
            raise ValueError(
                f"{site.name} norms its input, adds it to the output or rescales, which a mixer would skip: leave it "
                "out with `select`"
            )

    def attach_grid(self, layers: Iterable[nn.Module]) -> list[RemovableHandle]:
        """The model's rotary embedding takes the shape of the image; its attention layers read it there."""
        if not list(layers):
            return []
        handles = [self.model.register_forward_pre_hook(_shape_rotary, with_kwargs=True)]
        for module in self.model.modules():
            if isinstance(module, Attention):
                handles.append(module.register_forward_pre_hook(_flatten_rotary, with_kwargs=True))
        return handles

    def condition_shapes(self, batch: int = 1, text_tokens: int = TEXT_TOKENS) -> dict[str, tuple[int, ...]]:
        """`text` of CLIP and `text_t5`, of the lengths that the model has padding for, and `time_ids` (b, 6)."""
        config = self.model.config
        return {
            "text": (batch, config.text_len, config.cross_attention_dim),
            "text_t5": (batch, config.text_len_t5, config.cross_attention_dim_t5),
            "time_ids": (batch, 6),
        }

    def forward_arguments(self, conditions: Conditions) -> dict[str, Any]:
        """Both texts, their masks (all tokens are visible unless `text_mask`, `text_t5_mask` say otherwise), sizes."""
        text = conditions["text"]
        text_t5 = conditions["text_t5"]
        masks = []
        for name, tokens in (("text_mask", text), ("text_t5_mask", text_t5)):
            mask = conditions.get(name)
            masks.append(tokens.new_ones(tokens.shape[:2]) if mask is None else mask)
        return {
            "encoder_hidden_states": text,
            "text_embedding_mask": masks[0],
            "encoder_hidden_states_t5": text_t5,
            "text_embedding_mask_t5": masks[1],
            "image_meta_size": conditions["time_ids"],
            "style": torch.zeros(len(text), dtype=torch.long, device=text.device),  # the only one there is
        }

    def encode_prompts(
        self, pipe: Any, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None, *, guided: bool = True
    ) -> tuple[Conditions, Conditions]:
        """`text` and `text_t5`, with `text_mask` and `text_t5_mask`, 0 for padding."""
        config = self.model.config
        positive: dict[str, Tensor] = {}
        negative: dict[str, Tensor] = {}
        for index, (name, length) in enumerate((("text", config.text_len), ("text_t5", config.text_len_t5))):
            text, negative_text, mask, negative_mask = pipe.encode_prompt(
                list(prompts),
                device=self.device,
                dtype=self.dtype,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
                negative_prompt=None if negative_prompts is None else list(negative_prompts),
                max_sequence_length=length,
                text_encoder_index=index,
            )
            positive |= {name: text, f"{name}_mask": mask}
            negative |= {name: negative_text, f"{name}_mask": negative_mask}
        return positive, negative if guided else {}

    def size_conditions(self, size: tuple[int, int], batch: int = 1) -> dict[str, Tensor]:
        """`time_ids`: original size, as the pipeline passes it, target size and crop, in float32."""
        ids = torch.tensor([[*ORIGINAL_SIZE, *size, 0, 0]], dtype=torch.float32, device=self.device)
        return {"time_ids": ids.repeat(batch, 1)}

    def _read_output(self, output: Tensor, noisy: Tensor) -> Tensor:
        """The first half of the channels of models that also predict variances."""
        return output[:, : noisy.shape[1]]

    def _noise_arguments(self, noisy: Tensor, timestep: Tensor) -> dict[str, Any]:
        patch = self.model.config.patch_size
        grid = (noisy.shape[-2] // patch, noisy.shape[-1] // patch)
        return {
            "hidden_states": noisy,
            "timestep": timestep.to(noisy.dtype),  # the model computes its embedding in this dtype
            ROTARY_ARGUMENT: rotary_embedding(self.model, grid, noisy.device),
        }


def rotary_embedding(model: Any, grid: GridSize, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (height·width, k) for images of `grid` patches, as HunyuanDiTPipeline makes them."""
    from diffusers.pipelines.hunyuandit import pipeline_hunyuandit  # pipelines take a second to import

    region = pipeline_hunyuandit.get_resize_crop_region_for_grid(grid, BASE_LATENTS // model.config.patch_size)
    channels = model.inner_dim // model.num_heads
    embedding: tuple[Tensor, Tensor] = get_2d_rotary_pos_embed(channels, region, grid, device=device, output_type="pt")
    return embedding


def _shape_rotary(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookArguments:
    rotary = args[ROTARY_POSITION] if len(args) > ROTARY_POSITION else kwargs.get(ROTARY_ARGUMENT)
    if rotary is None:
        return args, kwargs
    latents = args[0] if args else kwargs["hidden_states"]
    patch: Any = module.config.patch_size  # type: ignore[union-attr]
    grid = (latents.shape[-2] // patch, latents.shape[-1] // patch)
    shaped = tuple(part.expand(grid[0] * grid[1], -1).unflatten(0, grid) for part in rotary)
    if len(args) > ROTARY_POSITION:
        return (*args[:ROTARY_POSITION], shaped, *args[ROTARY_POSITION + 1 :]), kwargs
    return args, {**kwargs, ROTARY_ARGUMENT: shaped}


def _flatten_rotary(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookArguments:
    rotary = kwargs.get(ROTARY_ARGUMENT)
    if rotary is None or rotary[0].ndim == 2:  # called alone, not by the model
        return args, kwargs
    height, width, _ = rotary[0].shape
    extended = {**kwargs, ROTARY_ARGUMENT: tuple(part.flatten(0, 1) for part in rotary)}
    return args, {**extended, GRID_ARGUMENT: (height, width)} if isinstance(module, MountedLayer) else extended
