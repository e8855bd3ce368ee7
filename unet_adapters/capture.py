"""What sites are given and put out, recorded while a UNet runs; and a site run again on what was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from unet_adapters.grid import PLACE as GRID
from unet_adapters.sites import resolve_unet

T = TypeVar("T")
Grid = tuple[int, int]


@dataclass(frozen=True)
class SiteCall:
    """One call of a site.

    Attributes:
        input, output: tokens (b, l, d).
        grid: the (height, width) of the picture that the tokens are; None where they are none.
    """

    input: Tensor
    output: Tensor
    grid: Grid | None


@contextmanager
def capture_sites(unet: Any, site_names: Iterable[str]) -> Iterator[dict[str, SiteCall]]:
    """Record the calls of the attention layers at `site_names`, mounted or not, by name.

    The dictionary is emptied and filled by each forward of the UNet inside the context, and stays readable afterwards.
    Its tensors are attached to the graph. What gradient checkpointing runs again in `backward` is not recorded: the
    tensors stay those of the forward, so that a loss on them has the gradients it has without checkpointing. The hooks
    are gone on exit. A UNet that was compiled before does not see them. Cost: the memory of inputs and outputs.

    Raises:
        ValueError: the UNet has no module of that name.
    """
    with _captured(unet, site_names, SiteCall) as calls:
        yield calls


@contextmanager
def capture_outputs(unet: Any, site_names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """As `capture_sites`, the outputs (b, l, d) alone."""
    with _captured(unet, site_names, lambda _input, output, _grid: output) as outputs:
        yield outputs


def replay(unet: Any, site_name: str, call: SiteCall) -> Tensor:
    """What the attention layer at a site, as it is mounted now, makes of a recorded input: (b, l, d).

    Raises:
        ValueError: the UNet has no module of that name.
    """
    layer = _layer(resolve_unet(unet), site_name)
    if hasattr(layer, "mixer"):
        setattr(layer, GRID, call.grid)  # the dispatcher takes it away
    return layer(call.input)


@contextmanager
def _captured(
    unet: Any, site_names: Iterable[str], keep: Callable[[Tensor, Tensor, Grid | None], T]
) -> Iterator[dict[str, T]]:
    root = resolve_unet(unet)
    found: dict[str, T] = {}
    grids: dict[str, Grid | None] = {}

    def record(name: str, place: str, _module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        if name not in found:  # a second call within one forward is gradient checkpointing's
            tokens = args[0] if args else kwargs["hidden_states"]
            found[name] = keep(tokens, output, grids.get(place))

    def measure(place: str, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        picture = args[0] if args else kwargs["hidden_states"]
        grids[place] = (picture.shape[-2], picture.shape[-1]) if picture.ndim == 4 else None

    with ExitStack() as stack:
        stack.callback(root.register_forward_pre_hook(lambda *_: found.clear()).remove)
        for name in site_names:
            layer, place = _layer(root, name), _picture_place(root, name)
            seen = layer.register_forward_hook(partial(record, name, place), with_kwargs=True)
            stack.callback(seen.remove)
            if place not in grids:
                grids[place] = None
                told = root.get_submodule(place).register_forward_pre_hook(partial(measure, place), with_kwargs=True)
                stack.callback(told.remove)
        yield found


def _picture_place(root: nn.Module, name: str) -> str:
    """The transformer that a layer lies in, which is called with a picture; the layer itself where there is none."""
    parts = name.split(".")
    above = (".".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1))
    return next((place for place in above if isinstance(root.get_submodule(place), Transformer2DModel)), name)


def _layer(unet: nn.Module, name: str) -> nn.Module:
    try:
        return unet.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the UNet has no layer {name!r} to capture; find_sites lists the sites") from None
