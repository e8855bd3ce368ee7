"""Pass the size of the image to attention layers as an argument of their call.

    outer module (b, d, height, width)  --hook-->  kwargs[argument]["mixer_grid"] = (height, width)
    blocks                              ------->   hand these keyword arguments to each of their attention layers
    attention without a mixer           --hook-->  drops it

Hooks are functions of this module and have no state but their arguments, so that models can be copied and pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from unet_adapters.mounted_layer import GRID_ARGUMENT, GridSize, MountedLayer

HookArguments = tuple[tuple[Any, ...], dict[str, Any]]
Measure = Callable[[tuple[Any, ...], dict[str, Any]], GridSize | None]


def pass_grid(outer: nn.Module, measure: Measure, argument: str, layers: Iterable[nn.Module]) -> list[RemovableHandle]:
    """Hook `outer` and the attention layers in it; `remove` the handles to undo it.

    Args:
        outer: the module whose forward receives the image.
        measure: (positional arguments, keyword arguments) of its call -> the grid, or None.
        argument: the keyword argument of `outer`, a dictionary, that reaches the attention layers.
        layers: every layer that receives it: one without a mixer must not see the extra entry.
    """
    add = partial(_add_grid, measure=measure, argument=argument)
    handles = [outer.register_forward_pre_hook(add, with_kwargs=True)]
    handles += [layer.register_forward_pre_hook(_drop_grid, with_kwargs=True) for layer in layers]
    return handles


def measure_image(args: tuple[Any, ...], kwargs: dict[str, Any]) -> GridSize | None:
    """(height, width) of `hidden_states` (b, d, height, width); None for tokens."""
    hidden_states = args[0] if args else kwargs["hidden_states"]
    return (hidden_states.shape[-2], hidden_states.shape[-1]) if hidden_states.ndim == 4 else None


def _add_grid(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], measure: Measure, argument: str
) -> HookArguments:
    grid = measure(args, kwargs)
    if grid is None:
        return args, kwargs
    return args, {**kwargs, argument: {**(kwargs.get(argument) or {}), GRID_ARGUMENT: grid}}


def _drop_grid(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookArguments:
    if isinstance(module, MountedLayer):
        return args, kwargs
    return args, {key: value for key, value in kwargs.items() if key != GRID_ARGUMENT}
