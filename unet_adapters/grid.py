"""The size of the image, told to mixers that read in two dimensions: per call, and stored nowhere between calls.

    Transformer2DModel (b, d, height, width)  --hook-->  cross_attention_kwargs["mixer_grid"] = (height, width)
    BasicTransformerBlock                     --hook-->  takes it out again and lays it on its attn1
    attn1's dispatcher                        ------->   picks it up

It travels as an argument of the block, so that gradient checkpointing, which calls the block once more, brings it
again; and it is gone before the attention layers see their arguments. Hooks are functions of this module and know
nothing but the module they are called with, so that models can be copied and pickled.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.utils.hooks import RemovableHandle

KEY = "mixer_grid"
PLACE = "_mixer_grid"
Call = tuple[tuple[Any, ...], dict[str, Any]]
KWARGS, POSITION = "cross_attention_kwargs", 5  # under gradient checkpointing diffusers hands it over by position


def tell_grids(unet: nn.Module, sites: list[str]) -> list[RemovableHandle]:
    """Hook the transformers that these sites lie in; `remove` the handles to undo it.

    Every block of such a transformer is hooked: one without a mixer must not see the extra argument either.
    """
    handles = []
    for name, transformer in unet.named_modules():
        if not isinstance(transformer, Transformer2DModel) or not any(site.startswith(f"{name}.") for site in sites):
            continue
        handles.append(transformer.register_forward_pre_hook(_measure, with_kwargs=True))
        for block in transformer.modules():
            if isinstance(block, BasicTransformerBlock):
                handles.append(block.register_forward_pre_hook(_deliver, with_kwargs=True))
    return handles


def take_grid(attn: nn.Module) -> tuple[int, int] | None:
    """The (height, width) that lies on a layer, taken away; None where nobody told it."""
    grid = getattr(attn, PLACE, None)
    if grid is not None:
        setattr(attn, PLACE, None)
    return grid


def _measure(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden_states = args[0] if args else kwargs["hidden_states"]
    if hidden_states.ndim != 4:
        return args, kwargs
    told = dict(kwargs.get(KWARGS) or {}) | {KEY: (hidden_states.shape[-2], hidden_states.shape[-1])}
    return args, kwargs | {KWARGS: told}


def _deliver(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    by_position = len(args) > POSITION
    told = args[POSITION] if by_position else kwargs.get(KWARGS)
    if not told or KEY not in told:
        return args, kwargs
    rest = {key: value for key, value in told.items() if key != KEY}
    if hasattr(module.attn1, "mixer"):
        setattr(module.attn1, PLACE, told[KEY])
    if by_position:
        return (*args[:POSITION], rest, *args[POSITION + 1 :]), kwargs
    return args, kwargs | {KWARGS: rest}
