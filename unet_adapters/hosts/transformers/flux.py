"""Flux: joint attention over [text, image], with norms of queries and keys per head and rotary embeddings.

Double blocks project text and image apart. Single blocks get both in one sequence, with the same projections for both
and without an output projection in the layer; how many tokens are text is read from the call of the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isqrt
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle

from mixers.context import Rotation
from unet_adapters.attention import check_grid, check_heads, view_teacher
from unet_adapters.hosts.base import GridSource, Host, TextSource, register_host
from unet_adapters.hosts.calls import Conditions
from unet_adapters.hosts.grids import HookArguments, pass_grid
from unet_adapters.hosts.transformers.joint_attention import project_text
from unet_adapters.joint import ProjectedText, mix_jointly
from unet_adapters.layer_projections import LayerProjections
from unet_adapters.mounted_layer import TEXT_ARGUMENT, GridSize, MountedLayer, stock_processor
from unet_adapters.padding import find_visible
from unet_adapters.sites import Site

TEXT_TOKENS = 512  # the longest prompts of Flux's T5
PACKED = 2  # latents are packed into tokens of 2 × 2 latent pixels before the model is called
ID_AXES = 3  # a token's position: image, row, column


class FluxDispatch:
    """The processor of a mounted Flux layer: stateless."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        mixer_grid: GridSize | None = None,
        mixer_text_tokens: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Mix image tokens (b, l, d) and text tokens (b, t, d), or both in one sequence, text first.

        Raises:
            ValueError: it is unknown how many tokens are text; the mask is not one of padding; the stock processor is
                not a supported one; or the tokens are not those of the grid.
        """
        processor = stock_processor(attn)
        attn.require_supported(processor)
        joined = encoder_hidden_states is None
        if joined and mixer_text_tokens is None:
            raise ValueError(
                "a mounted mixer got text and image in one sequence, and no mixer_text_tokens: call the whole block, "
                "whose hook passes it"
            )
        text_count = mixer_text_tokens if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        assert text_count is not None
        length = hidden_states.shape[1] - (text_count if joined else 0)
        if length < attn.mixer_from:
            teacher, processor = view_teacher(attn, processor, hidden_states, {})
            stock: Tensor | tuple[Tensor, Tensor] = processor(
                teacher, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return stock
        check_grid(length, mixer_grid)
        if encoder_hidden_states is None:
            text, image = hidden_states.split([text_count, length], dim=1)
        else:
            text = encoder_hidden_states
            image = hidden_states
        mixed, text_heads = self._mix(attn, image, text, joined, attention_mask, image_rotary_emb, mixer_grid)
        if joined:
            return torch.cat([text_heads, mixed], dim=1)
        return mixed, attn.to_add_out(text_heads)

    def _mix(
        self,
        attn: Any,
        image: Tensor,
        text: Tensor,
        joined: bool,
        attention_mask: Tensor | None,
        image_rotary_emb: tuple[Tensor, Tensor] | None,
        grid: GridSize | None,
    ) -> tuple[Tensor, Tensor]:
        text_count = text.shape[1]
        rotation = None if image_rotary_emb is None else Rotation(*image_rotary_emb)
        visible = find_visible(attention_mask, len(image), text_count + image.shape[1])
        projections = LayerProjections(attn)
        if joined:
            parts = (projections.to_q(text), projections.to_k(text), projections.to_v(text))
            projected = ProjectedText(*(part.unflatten(-1, (attn.heads, -1)) for part in parts))
        else:
            projected = project_text(attn, text)
        projected = ProjectedText(
            projected.q,
            projected.k,
            projected.v,
            rotation=None if rotation is None else rotation[:text_count],
            visible=None if visible is None else visible[:, :text_count],
        )
        return mix_jointly(
            attn.mixer,
            projections,
            image,
            projected,
            grid=grid,
            rotation=None if rotation is None else rotation[text_count:],
            visible=None if visible is None else visible[:, text_count:],
        )


class FluxMixerAttention(MountedLayer, FluxAttention):
    """The attention of a double block; made only by `attn.__class__ = FluxMixerAttention`."""

    stock_class = FluxAttention
    dispatcher = FluxDispatch()
    supported_processors = frozenset({FluxAttnProcessor})

    @classmethod
    def is_fused(cls, layer: nn.Module) -> bool:
        """Whether the layer runs on a fused copy of its projections; its processor is the same then."""
        return bool(getattr(layer, "fused_projections", False))


class FluxSingleMixerAttention(FluxMixerAttention):
    """The attention of a single block, which has no output projection."""

    projection_names = ("to_q", "to_k", "to_v")


@register_host("flux")
class FluxHost(Host):
    """`attn` of every double and every single block."""

    predicts_flow = True

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether it is a `FluxTransformer2DModel`."""
        return isinstance(model, FluxTransformer2DModel)

    def sites(self) -> list[Site]:
        """The attention of every block; a site's group is its block."""
        sites = []
        for stack in ("transformer_blocks", "single_transformer_blocks"):
            for index, block in enumerate(getattr(self.model, stack)):
                group = f"{stack}.{index}"
                attn: Any = block.attn
                sites.append(Site(f"{group}.attn", attn.query_dim, attn.heads, group, True, True, True))
        return sites

    def mounted_class(self, layer: nn.Module) -> type[MountedLayer] | None:
        """`FluxMixerAttention`, or for single blocks `FluxSingleMixerAttention`."""
        if type(layer) is not FluxAttention:
            return None
        return FluxSingleMixerAttention if layer.pre_only else FluxMixerAttention

    def check_layer(self, site: Site, layer: Any) -> None:
        """See `attention.check_heads`."""
        check_heads(site, layer)

    def attach_grid(self, layers: Iterable[nn.Module]) -> list[RemovableHandle]:
        """The model adds the grid to the `joint_attention_kwargs` of its attention layers."""
        if not list(layers):
            return []
        attentions = [module for module in self.model.modules() if isinstance(module, FluxAttention)]
        return pass_grid(self.model, measure_ids, "joint_attention_kwargs", attentions)

    def attach_text_lengths(self, layers: Iterable[nn.Module]) -> list[RemovableHandle]:
        """Single blocks around a layer add the number of text tokens to its arguments."""
        receivers = {id(layer) for layer in layers}
        blocks = [block for block in self.model.single_transformer_blocks if id(block.attn) in receivers]
        return [block.register_forward_pre_hook(_add_text_length, with_kwargs=True) for block in blocks]

    def grid_source(self, site_name: str) -> GridSource | None:
        """The model itself."""
        return GridSource("", measure_ids)

    def text_source(self, site_name: str) -> TextSource | None:
        """Of single blocks, the block."""
        block = site_name.rpartition(".")[0]
        return TextSource(block, count_text_tokens) if block.startswith("single_transformer_blocks") else None

    def tokens_at(self, site: Site, size: tuple[int, int]) -> int | None:
        """Image tokens: groups of 2 × 2 latent pixels."""
        return (size[0] // PACKED) * (size[1] // PACKED)

    def condition_shapes(self, batch: int = 1, text_tokens: int = TEXT_TOKENS) -> dict[str, tuple[int, ...]]:
        """`text` and `pooled`; of guidance-distilled models also `guidance` (b,), the guidance scale."""
        config = self.model.config
        shapes: dict[str, tuple[int, ...]] = {
            "text": (batch, text_tokens, config.joint_attention_dim),
            "pooled": (batch, config.pooled_projection_dim),
        }
        if config.guidance_embeds:
            shapes["guidance"] = (batch,)
        return shapes

    def forward_arguments(self, conditions: Conditions) -> dict[str, Any]:
        """`encoder_hidden_states`, `txt_ids`, `pooled_projections`, and `guidance` where there is such a condition."""
        text = conditions["text"]
        return {
            "encoder_hidden_states": text,
            "txt_ids": text.new_zeros(text.shape[1], ID_AXES),
            "pooled_projections": conditions["pooled"],
            "guidance": conditions.get("guidance"),
        }

    def encode_prompts(
        self, pipe: Any, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None, *, guided: bool = True
    ) -> tuple[Conditions, Conditions]:
        """`text` and `pooled`; negative prompts are for models that are not guidance-distilled."""

        def encode(texts: Sequence[str]) -> Conditions:
            text, pooled, _ = pipe.encode_prompt(list(texts), None, device=self.device, num_images_per_prompt=1)
            return {"text": text, "pooled": pooled}

        return encode(prompts), encode(negative_prompts or [""] * len(prompts)) if guided else {}

    def timestep_options(self, scheduler: Any, size: tuple[int, int], steps: int) -> dict[str, Any]:
        """See `DenoiserCalls.timestep_options`; Flux's noise levels, before the shift, are 1, …, 2/steps, 1/steps."""
        sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
        return {**super().timestep_options(scheduler, size, steps), "sigmas": sigmas}

    @property
    def latent_multiple(self) -> int:
        """Latents are packed into tokens of 2 × 2."""
        return PACKED

    @property
    def native_latents(self) -> int:
        """128: images of 1,024 pixels."""
        return 128

    @property
    def embeds_guidance(self) -> bool:
        """Whether the model is guidance-distilled."""
        return bool(self.model.config.guidance_embeds)

    def guidance_conditions(self, pipe: Any, scale: float, batch: int = 1) -> dict[str, Tensor]:
        """`guidance`, the scale, in float32."""
        return {"guidance": torch.full((batch,), scale, device=self.device)} if self.embeds_guidance else {}

    def latent_shape(self, size: tuple[int, int], batch: int = 1) -> tuple[int, ...]:
        """(b, c, height, width), before packing."""
        return (batch, self.model.config.in_channels // PACKED**2, *size)

    def _noise_arguments(self, noisy: Tensor, timestep: Tensor) -> dict[str, Any]:
        height, width = (side // PACKED for side in noisy.shape[-2:])
        return {
            "hidden_states": pack(noisy),
            "timestep": timestep / 1000,  # the model multiplies by 1000
            "img_ids": image_ids(height, width, noisy),
        }

    def _read_output(self, output: Tensor, noisy: Tensor) -> Tensor:
        """The tokens as latents."""
        height, width = (side // PACKED for side in noisy.shape[-2:])
        return unpack(output, (height, width))


def pack(latents: Tensor) -> Tensor:
    """Latents (b, c, height, width) -> tokens (b, height·width / 4, 4·c)."""
    blocks = latents.unflatten(3, (-1, PACKED)).unflatten(2, (-1, PACKED))  # (b, c, rows, 2, columns, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, grid: GridSize) -> Tensor:
    """Tokens (b, rows·columns, 4·c) -> latents (b, c, 2·rows, 2·columns)."""
    blocks = tokens.unflatten(2, (-1, PACKED, PACKED)).unflatten(1, grid)  # (b, rows, columns, c, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def image_ids(height: int, width: int, like: Tensor) -> Tensor:
    """Positions (height·width, 3) of image tokens: 0, row, column."""
    ids = like.new_zeros(height, width, ID_AXES)
    ids[..., 1] = torch.arange(height, device=like.device)[:, None]
    ids[..., 2] = torch.arange(width, device=like.device)
    return ids.flatten(0, 1)


def measure_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> GridSize | None:
    """(height, width) of the image whose positions are in `img_ids`; None if they are those of several images.

    Reads the last position, which waits for the device once per call of the model. Where tensors have shapes and no
    numbers, for an estimate, any image of as many tokens stands for the real one.
    """
    ids = kwargs["img_ids"] if "img_ids" in kwargs else args[4]
    ids = ids[0] if ids.ndim == 3 else ids
    if ids.is_meta or isinstance(ids, FakeTensor):
        rows = next(rows for rows in range(isqrt(len(ids)), 0, -1) if len(ids) % rows == 0)
        return rows, len(ids) // rows
    _, last_row, last_column = ids[-1].tolist()
    grid = (int(last_row) + 1, int(last_column) + 1)
    return grid if grid[0] * grid[1] == len(ids) else None


def count_text_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The number of text tokens that a single block is called with."""
    text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
    return int(text.shape[1])


def _add_text_length(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookArguments:
    name = "joint_attention_kwargs"
    position = 4  # gradient checkpointing passes all arguments by position
    passed = args[position] if len(args) > position else kwargs.get(name)
    extended = {**(passed or {}), TEXT_ARGUMENT: count_text_tokens(args, kwargs)}
    if len(args) > position:
        return (*args[:position], extended, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: extended}
