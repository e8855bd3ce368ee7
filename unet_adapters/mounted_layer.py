"""What every attention layer with a mixer in it has in common, whatever diffusers class it was before."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unet_adapters.projections import TeacherProjection

GridSize = tuple[int, int]
"""(height, width) of the image whose tokens a layer mixes; height · width tokens, row by row."""

GRID_ARGUMENT = "mixer_grid"

BACKEND_METHODS = ("set_attention_backend", "reset_attention_backend")
"""The methods of a diffusers model that change the attention backend of its processors."""

TEXT_ARGUMENT = "mixer_text_tokens"
"""The argument that tells a layer which gets text and image in one sequence how many tokens are text."""


class MountedLayer(nn.Module):
    """Mixin of the classes that replace an attention layer's class while a mixer is mounted in it.

    A subclass inherits from this class and from the stock class, and has neither `__init__` nor `forward`: hooks, LoRA,
    slicing, PAG and IP-Adapter find the layer they expect. `processor` is the dispatcher; the processor that diffusers
    set stays in its slot and is in force again after unmounting.

    Attributes:
        stock_class: the diffusers class that it replaces.
        projection_names: the layer's q, k, v and output projections, which a student may train.
        dispatcher: called in place of a processor; stateless.
        supported_processors: classes of stock processors that compute plain attention with the layer's own weights. Any
            other has an effect of its own, which a mixer would silently ignore.
        fused_processors: those of them that read a fused copy of the projections.
        mixer_from: with fewer tokens than this, the layer is the teacher's softmax attention.
        teacher: what `projections.swap_in` took out, by projection name, where the student has its own and the layer
            needs it below `mixer_from`.
        teacher_bytes: size of everything that `projections.swap_in` took out; it stays in memory.
    """

    stock_class: ClassVar[type[nn.Module]]
    projection_names: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    dispatcher: ClassVar[Any]
    supported_processors: ClassVar[frozenset[type]]
    fused_processors: ClassVar[frozenset[type]] = frozenset()

    mixer_from: int = 0
    teacher_bytes: int = 0
    teacher: Mapping[str, TeacherProjection] = MappingProxyType({})

    @property
    def processor(self) -> Any:
        """The dispatcher. Assigning replaces the stock processor."""
        return self.dispatcher

    @processor.setter
    def processor(self, processor: Any) -> None:
        self.require_supported(processor)
        self.__dict__["processor"] = processor

    def get_processor(self, return_deprecated_lora: bool = False) -> Any:
        """The stock processor: the one that runs when no mixer is mounted."""
        return stock_processor(self)

    def set_processor(self, processor: Any) -> None:
        """Replace the stock processor; the mixer stays.

        Raises:
            ValueError: the class of the processor is not supported; the layer is unchanged.
        """
        self.require_supported(processor)
        self._modules.pop("processor", None)
        self.__dict__.pop("processor", None)
        self.processor = processor

    @classmethod
    def require_supported(cls, processor: Any) -> None:
        """Refuse a processor that reads or edits attention weights, or has weights of its own.

        Raises:
            ValueError: the processor's class is not in `supported_processors`.
        """
        kind = type(processor)
        if kind not in cls.supported_processors:
            raise ValueError(
                f"the processor {kind.__name__} works on softmax attention and has no effect on a mixer: "
                "unmount the adapter, or leave the site out with `select`, to use it"
            )

    @classmethod
    def is_fused(cls, layer: nn.Module) -> bool:
        """Whether a layer, mounted or not, runs on a fused copy of its projections."""
        return type(stock_processor(layer)) in cls.fused_processors

    def get_extra_state(self) -> Tensor:
        """One more name in the state dict: a stock layer never loads a mounted one's weights as if they were its own.

        A mixer without weights of its own would leave no other trace.
        """
        return torch.ones(1, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to restore."""


def stock_processor(layer: nn.Module) -> Any:
    """The processor that diffusers set on a layer, mounted or not; an attribute, or a child module."""
    processor = layer._modules.get("processor")
    return layer.__dict__["processor"] if processor is None else processor


def call_layer(
    layer: nn.Module,
    tokens: Tensor,
    grid: GridSize | None = None,
    text_tokens: int | None = None,
    **arguments: Any,
) -> Tensor:
    """Run one attention layer on its own, mounted or not: tokens (b, l, d) -> (b, l, d).

    Args:
        layer: the layer.
        tokens: its first argument.
        grid: of the image tokens; only a mounted layer takes it.
        text_tokens: how many of `tokens` are text; likewise.
        **arguments: the layer's other arguments: text tokens, rotary embeddings.
    """
    if isinstance(layer, MountedLayer):
        extra = {GRID_ARGUMENT: grid, TEXT_ARGUMENT: text_tokens}
        arguments |= {name: value for name, value in extra.items() if value is not None}
    return image_output(layer(tokens, **arguments))


def image_output(output: Any) -> Tensor:
    """The image tokens that a layer returns, alone or followed by text tokens."""
    image: Tensor = output[0] if isinstance(output, tuple) else output
    return image


def guard_processors(model: nn.Module) -> None:
    """Make the methods of the model that change processors work with mounted layers.

    `set_attn_processor` checks all mounted layers before it changes the first: diffusers sets one layer after the
    other, so that a refusal would leave a hybrid half changed. The methods for attention backends reach the stock
    processors: the softmax attention of text, and of layers below `min_tokens` or unmounted, runs on the backend.
    """
    replacements: dict[str, Any] = {"set_attn_processor": partial(_set_processors, model)}
    replacements |= {name: partial(_call_on_stock_processors, model, name) for name in BACKEND_METHODS}
    for name, replacement in replacements.items():
        if hasattr(model, name) and name not in vars(model):
            vars(model)[name] = replacement


def unguard_processors(model: nn.Module) -> None:
    """Undo `guard_processors`, unless another adapter is mounted in the model."""
    if not any(isinstance(module, MountedLayer) for module in model.modules()):
        for name in ("set_attn_processor", *BACKEND_METHODS):
            vars(model).pop(name, None)


def _call_on_stock_processors(model: nn.Module, name: str, *args: Any, **kwargs: Any) -> None:
    """Call a method of the model while its mounted layers have their stock classes, and so their stock processors."""
    layers = [module for module in model.modules() if isinstance(module, MountedLayer)]
    classes = [type(layer) for layer in layers]
    try:
        for layer in layers:
            layer.__class__ = layer.stock_class  # type: ignore[assignment]
        getattr(type(model), name)(model, *args, **kwargs)
    finally:
        for layer, mounted_class in zip(layers, classes, strict=True):
            layer.__class__ = mounted_class


def _set_processors(model: nn.Module, processor: Any, *args: Any, **kwargs: Any) -> None:
    for name, module in model.named_modules():
        if isinstance(module, MountedLayer):
            replacement = processor.get(f"{name}.processor") if isinstance(processor, dict) else processor
            if replacement is not None:
                module.require_supported(replacement)
    stock: Any = type(model)
    stock.set_attn_processor(model, processor, *args, **kwargs)
