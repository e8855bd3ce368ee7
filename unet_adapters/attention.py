"""diffusers' `Attention` with a mixer in it, and the dispatcher that runs in place of its processor."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from unet_adapters.mounted_layer import GridSize, MountedLayer, stock_processor
from unet_adapters.projections import teacher_view

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
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
        "XLAFlashAttnProcessor2_0",
    )
    if hasattr(stock, name)
)


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
            ValueError: the mask hides tokens, the stock processor is not a supported one, or the tokens are not those
                of the grid.
        """
        processor = stock_processor(attn)
        if encoder_hidden_states is not None:
            return _run_stock(processor, attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        attn.require_supported(processor)
        if _token_count(hidden_states) < attn.mixer_from:
            return _teacher_attention(attn, processor, hidden_states, attention_mask, temb)
        _require_all_visible(attention_mask)

        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            mixer_grid = (image_shape[2], image_shape[3])
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        hidden_states = _mix(attn, hidden_states, mixer_grid, PERTURBED_PARTS.get(type(processor)))
        if image_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


class MixerAttention(MountedLayer, Attention):
    """An `Attention` whose tokens are mixed by its child `mixer`; made only by `attn.__class__ = MixerAttention`."""

    stock_class = Attention
    dispatcher = MixerDispatch()
    supported_processors = PLAIN_PROCESSORS | PERTURBED_PARTS.keys()
    fused_processors = frozenset({stock.FusedAttnProcessor2_0})

    def get_processor(self, return_deprecated_lora: bool = False) -> Any:
        """The stock processor: the one that runs when no mixer is mounted."""
        if return_deprecated_lora:
            return Attention.get_processor(self, return_deprecated_lora=True)
        return super().get_processor()


def _teacher_attention(
    attn: Any, processor: Any, hidden_states: Tensor, attention_mask: Tensor | None, temb: Tensor | None
) -> Tensor:
    if attn.teacher:
        attn = teacher_view(attn, attn.teacher, hidden_states)
        if isinstance(processor, stock.FusedAttnProcessor2_0):  # fused from the student's projections
            processor = stock.AttnProcessor2_0()
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


def _require_all_visible(mask: Tensor | None) -> None:
    if mask is None:
        return
    visible = mask.all() if mask.dtype == torch.bool else (mask == 0).all()
    if not bool(visible):
        raise ValueError(
            "attention_mask hides tokens of a self-attention site, which a mounted mixer does not support: "
            "call the model without attention_mask, or unmount the adapter"
        )


def _token_count(hidden_states: Tensor) -> int:
    return hidden_states.shape[2] * hidden_states.shape[3] if hidden_states.ndim == 4 else hidden_states.shape[1]


def _mix(attn: Any, tokens: Tensor, grid: GridSize | None, parts: int | None) -> Tensor:
    if grid is not None and grid[0] * grid[1] != tokens.shape[1]:
        raise ValueError(
            f"a mounted mixer got {tokens.shape[1]} tokens of an image with {grid[0]} × {grid[1]}: a patch such as "
            "tomesd, HiDiffusion or HyperTile regroups tokens before this layer. Remove the patch, or use a mixer that "
            "needs no grid (scan='raster', no local convolution)"
        )
    if parts is None:
        return attn.mixer(tokens, grid=grid, projections=attn)
    *unperturbed, perturbed = tokens.chunk(parts)
    mixed = attn.mixer(torch.cat(unperturbed), grid=grid, projections=attn)
    return torch.cat([mixed, _identity_attention(attn, perturbed)])


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
