"""The attention layer with a mixer in it, and the dispatcher that its host calls as a processor."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from unet_adapters.grid import take_grid
from unet_adapters.student import teacher_projections

# Perturbed-attention guidance: the parts a batch is made of; the last part is the perturbed one.
PERTURBED_PARTS: dict[type, int] = {
    stock.PAGIdentitySelfAttnProcessor2_0: 2,
    stock.PAGCFGIdentitySelfAttnProcessor2_0: 3,
}


class MixerDispatch:
    """What a mounted layer hands out as its processor: stateless, so that diffusers may re-create or copy it.

    It keeps the contract of a stock processor (4-D input, spatial and group norm, residual, rescaling) around
    `attn.mixer`. Given `encoder_hidden_states` it steps aside for the stock ("nominal") processor.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens (b, l, d) or (b, d, height, width) -> the same shape.

        Raises:
            ValueError: the mask hides tokens, or a processor that is not stock diffusers was set on the layer.
        """
        nominal, grid = attn.get_processor(), take_grid(attn)
        if encoder_hidden_states is not None:
            return nominal(attn, hidden_states, encoder_hidden_states, attention_mask=attention_mask, temb=temb)
        require_stock_processor(nominal)
        if _tokens(hidden_states) < attn.mixer_from:
            with teacher_projections(attn, attn.teacher):
                return nominal(attn, hidden_states, attention_mask=attention_mask, temb=temb)
        _require_all_visible(attention_mask)

        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        picture = hidden_states.shape if hidden_states.ndim == 4 else None
        if picture is not None:
            grid = (hidden_states.shape[2], hidden_states.shape[3])
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        hidden_states = _mix(attn, hidden_states, grid, PERTURBED_PARTS.get(type(nominal)))
        if picture is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(picture)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


DISPATCH = MixerDispatch()


class MixerAttention(Attention):
    """An `Attention` whose tokens are mixed by its child `mixer`; made only by `attn.__class__ = MixerAttention`.

    It has no `__init__` and no `forward` of its own, so hooks, LoRA, slicing, PAG and IP-Adapter find the layer they
    know. `processor` hands out the dispatcher; the nominal processor stays where it was, for whoever asks for it or
    replaces it, and is in force again after unmounting.

    Attributes:
        mixer_from: with fewer tokens than this, the layer is the teacher's softmax attention.
        teacher: the teacher's Parameters of the projections, by projection name, where others are trained.
    """

    mixer_from: int = 0
    teacher: Mapping[str, Mapping[str, nn.Parameter]] = MappingProxyType({})

    @property
    def processor(self) -> MixerDispatch:
        """The dispatcher. Assigning replaces the nominal processor."""
        return DISPATCH

    @processor.setter
    def processor(self, processor: Any) -> None:
        require_stock_processor(processor)
        self.__dict__["processor"] = processor

    def get_processor(self, return_deprecated_lora: bool = False) -> Any:
        """The nominal processor: the one that runs when no mixer is mounted."""
        if return_deprecated_lora:
            return super().get_processor(return_deprecated_lora=True)
        module = self._modules.get("processor")
        return self.__dict__["processor"] if module is None else module

    def get_extra_state(self) -> Tensor:
        """One more name in the state dict: a stock layer never loads a mounted one's weights as if they were its own.

        A mixer without weights of its own would leave no other trace.
        """
        return torch.ones(1, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to restore."""

    def set_processor(self, processor: Any) -> None:
        """Replace the nominal processor; the mixer stays.

        Raises:
            ValueError: it is not stock diffusers; the one before stays.
        """
        require_stock_processor(processor)
        self._modules.pop("processor", None)
        self.__dict__.pop("processor", None)
        self.processor = processor


def require_stock_processor(processor: Any) -> None:
    """Refuse a processor that reads or edits attention weights, which a mixer would silently ignore.

    Raises:
        ValueError: the processor's class is not one of `diffusers.models.attention_processor`.
    """
    kind = type(processor)
    if kind.__module__ != stock.__name__:
        raise ValueError(
            f"the processor {kind.__name__} works on softmax attention and has no effect on a mixer: "
            "unmount the adapter, or leave the site out with `select`, to use it"
        )


def _require_all_visible(mask: Tensor | None) -> None:
    if mask is None:
        return
    visible = mask.all() if mask.dtype == torch.bool else (mask == 0).all()
    if not bool(visible):
        raise ValueError(
            "attention_mask hides tokens of a self-attention site, which a mounted mixer does not support: "
            "call the UNet without attention_mask, or unmount the adapter"
        )


def _tokens(hidden_states: Tensor) -> int:
    return hidden_states.shape[2] * hidden_states.shape[3] if hidden_states.ndim == 4 else hidden_states.shape[1]


def _mix(attn: Attention, tokens: Tensor, grid: tuple[int, int] | None, parts: int | None) -> Tensor:
    if parts is None:
        return attn.mixer(tokens, grid=grid, projections=attn)
    *kept, perturbed = tokens.chunk(parts)
    mixed = attn.mixer(torch.cat(kept), grid=grid, projections=attn)
    return torch.cat([mixed, _identity_attention(attn, perturbed)])


def _identity_attention(attn: Attention, tokens: Tensor) -> Tensor:
    output = attn.to_v(tokens)
    layers = attn.to_out if isinstance(attn.to_out, nn.ModuleList) else [attn.to_out]
    for layer in layers:
        output = layer(output)
    return output


def _register_for_layer_skip() -> None:
    """diffusers' layer skipping looks a processor's class up in a table of its own, which is private."""
    try:
        from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
        from diffusers.hooks._helpers import _skip_proc_output_fn_Attention_AttnProcessor2_0 as skip
    except ImportError:  # another version of diffusers: skipping a mounted layer then says "not registered"
        return
    AttentionProcessorRegistry.register(MixerDispatch, AttentionProcessorMetadata(skip_processor_output_fn=skip))


_register_for_layer_skip()
