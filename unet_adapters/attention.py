"""diffusers' `Attention` with a mixer in it, and the dispatcher that runs in place of its processor."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from mixers.context import MixingContext
from unet_adapters.layer_projections import LayerProjections
from unet_adapters.mounted_layer import GridSize, MountedLayer, stock_processor
from unet_adapters.padding import find_visible
from unet_adapters.projections import teacher_view
from unet_adapters.sites import Site

# Perturbed-attention guidance: the number of parts that a batch is made of; the last part is the perturbed one.
PERTURBED_PARTS: dict[type, int] = {
    stock.PAGIdentitySelfAttnProcessor2_0: 2,
    stock.PAGCFGIdentitySelfAttnProcessor2_0: 3,
}

# Processors that compute softmax attention with the layer's own weights; the names vary with diffusers' version.
PLAIN_PROCESSORS = frozenset(
    getattr(stock, name)
    for name in (
        "AttnProcessor",
        "AttnProcessor2_0",
        "AttnProcessorNPU",
        "FusedAttnProcessor2_0",
        "FusedJointAttnProcessor2_0",
        "JointAttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
        "XLAFlashAttnProcessor2_0",
    )
    if hasattr(stock, name)
)

# Processors that read a fused copy of the projections, and what computes the same without it.
UNFUSED: dict[type, type] = {
    stock.FusedAttnProcessor2_0: stock.AttnProcessor2_0,
    stock.FusedJointAttnProcessor2_0: stock.JointAttnProcessor2_0,
}


class MixerDispatch:
    """The processor of a mounted layer: stateless, so that diffusers may re-create or copy it.

    It keeps the contract of a stock processor (4-D input, spatial and group norm, residual, rescaling) around
    `attn.mixer`. Given `encoder_hidden_states`, it runs the stock processor instead.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        mixer_grid: GridSize | None = None,
    ) -> Tensor:
        """Mix tokens (b, l, d) or (b, d, height, width) -> the same shape.

        Raises:
            ValueError: the mask is not one of padding, or the mixer cannot leave padding out; the stock processor is
                not a supported one; or the tokens are not those of the grid.
        """
        processor = stock_processor(attn)
        if encoder_hidden_states is not None:
            return _run_stock(processor, attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        attn.require_supported(processor)
        length = _token_count(hidden_states)
        if length < attn.mixer_from:
            return _teacher_attention(attn, processor, hidden_states, attention_mask, temb)
        visible = find_visible(attention_mask, len(hidden_states), length)

        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            mixer_grid = (image_shape[2], image_shape[3])
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if skips_attention_scores(attn):
            hidden_states = _identity_attention(attn, hidden_states)
        else:
            hidden_states = _mix(attn, hidden_states, mixer_grid, visible, PERTURBED_PARTS.get(type(processor)))
        if image_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


class MountedAttention(MountedLayer, Attention):
    """A mounted `Attention`, whatever it attends to."""

    stock_class = Attention
    fused_processors = frozenset(UNFUSED)

    def get_processor(self, return_deprecated_lora: bool = False) -> Any:
        """The stock processor: the one that runs when no mixer is mounted."""
        if return_deprecated_lora:
            return Attention.get_processor(self, return_deprecated_lora=True)
        return super().get_processor()


class MixerAttention(MountedAttention):
    """An `Attention` whose tokens are mixed by its child `mixer`; made only by `attn.__class__ = MixerAttention`."""

    dispatcher = MixerDispatch()
    supported_processors = PLAIN_PROCESSORS | PERTURBED_PARTS.keys()


def check_attention(site: Site, layer: Any) -> None:
    """Refuse an `Attention` with parts that `MixerDispatch` would skip.

    Raises:
        ValueError: it has added projections (for text), norms across heads, or an inner width that is not that of the
            tokens.
    """
    if getattr(layer, "add_k_proj", None) is not None:
        raise ValueError(f"{site.name} has add_k_proj, which a mixer would skip: leave it out with `select`")
    check_heads(site, layer)


def check_heads(site: Site, layer: Any) -> None:
    """Refuse an attention layer whose heads a mixer cannot use.

    Raises:
        ValueError: it has norms across heads, or an inner width that is not that of the tokens.
    """
    for name in ("norm_q", "norm_k"):
        weight = getattr(getattr(layer, name, None), "weight", None)
        if weight is not None and tuple(weight.shape) != (layer.inner_dim // layer.heads,):
            raise ValueError(f"{site.name} has {name} across heads, which a mixer cannot apply: leave it out")
    if layer.inner_dim != layer.query_dim:
        raise ValueError(
            f"{site.name} mixes at width {layer.inner_dim} but its tokens have width {layer.query_dim}: "
            "leave it out with `select`"
        )


def view_teacher(attn: Any, processor: Any, tokens: Tensor, unfused: Mapping[type, type]) -> tuple[Any, Any]:
    """The layer with the teacher's projections, and the processor that computes its attention.

    Args:
        attn: a mounted layer.
        processor: its stock processor.
        tokens: to be mixed.
        unfused: for a processor that reads a fused copy of the projections, which is the student's: what computes the
            same without it.
    """
    if not attn.teacher:
        return attn, processor
    view = teacher_view(attn, attn.teacher, tokens)
    vars(view)["fused_projections"] = False  # by which Flux's layers choose, where others have another processor
    kind = type(processor)
    return view, unfused[kind]() if kind in unfused else processor


def _teacher_attention(
    attn: Any, processor: Any, hidden_states: Tensor, attention_mask: Tensor | None, temb: Tensor | None
) -> Tensor:
    attn, processor = view_teacher(attn, processor, hidden_states, UNFUSED)
    return _run_stock(processor, attn, hidden_states, None, attention_mask, temb)


def _run_stock(
    processor: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
    temb: Tensor | None,
) -> Tensor:
    extra = {} if temb is None else {"temb": temb}  # SlicedAttnProcessor has no such argument
    output: Tensor = processor(attn, hidden_states, encoder_hidden_states, attention_mask=attention_mask, **extra)
    return output


def _token_count(hidden_states: Tensor) -> int:
    return hidden_states.shape[2] * hidden_states.shape[3] if hidden_states.ndim == 4 else hidden_states.shape[1]


def check_grid(tokens: int, grid: GridSize | None) -> None:
    """Refuse tokens that are not those of the image.

    Raises:
        ValueError: height · width is another number than `tokens`.
    """
    if grid is not None and grid[0] * grid[1] != tokens:
        raise ValueError(
            f"a mounted mixer got {tokens} tokens of an image with {grid[0]} × {grid[1]}: a patch such as "
            "tomesd, HiDiffusion or HyperTile regroups tokens before this layer. Remove the patch, or use a mixer that "
            "needs no grid (scan='raster', no local convolution)"
        )


def _mix(attn: Any, tokens: Tensor, grid: GridSize | None, visible: Tensor | None, parts: int | None) -> Tensor:
    check_grid(tokens.shape[1], grid)
    projections = LayerProjections(attn)
    if parts is None:
        context = None if visible is None else MixingContext(visible=visible)
        return attn.mixer(tokens, grid=grid, projections=projections, context=context)
    *unperturbed, perturbed = tokens.chunk(parts)
    mixed_tokens = torch.cat(unperturbed)
    context = None if visible is None else MixingContext(visible=visible[: len(mixed_tokens)])
    mixed = attn.mixer(mixed_tokens, grid=grid, projections=projections, context=context)
    return torch.cat([mixed, _identity_attention(attn, perturbed)])


def skips_attention_scores(attn: Any) -> bool:
    """Whether diffusers' layer skipping makes the attention of this layer the identity, as perturbed attention does.

    Its hook replaces `scaled_dot_product_attention` during the layer's call, which a mixer does not use.
    """
    registry = getattr(attn, "_diffusers_hook", None)
    return registry is not None and any(
        getattr(hook, "skip_attention_scores", False) for hook in registry.hooks.values()
    )


def _identity_attention(attn: Any, tokens: Tensor) -> Tensor:
    output = attn.to_v(tokens)
    layers = attn.to_out if isinstance(attn.to_out, nn.ModuleList) else [attn.to_out]
    for layer in layers:
        output = layer(output)
    return output


@cache
def register_for_layer_skip() -> None:
    """Let diffusers' layer skipping find `MixerDispatch` in its private table of processors; called by `mount`."""
    try:
        from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
        from diffusers.hooks._helpers import _skip_proc_output_fn_Attention_AttnProcessor2_0 as skip
    except ImportError:  # another version of diffusers: skipping a mounted layer then raises "not registered"
        return
    AttentionProcessorRegistry.register(MixerDispatch, AttentionProcessorMetadata(skip_processor_output_fn=skip))
