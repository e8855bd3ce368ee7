"""Record the inputs and outputs of sites while a model runs, and run a site again on a recorded input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from unet_adapters.hosts import GridSource, Host, find_host
from unet_adapters.mounted_layer import GridSize, call_layer

T = TypeVar("T")


@dataclass(frozen=True)
class SiteCall:
    """One call of a site.

    Attributes:
        input: tokens (b, l, d).
        output: tokens (b, l, d).
        grid: (height, width) of the image that the tokens are; None if the host does not show it.
    """

    input: Tensor
    output: Tensor
    grid: GridSize | None


@contextmanager
def capture_sites(pipe_or_model: Any, site_names: Iterable[str]) -> Iterator[dict[str, SiteCall]]:
    """Record the calls of the attention layers at `site_names`, mounted or not, by name.

    The dictionary is emptied and filled by each forward of the model inside the context, and stays readable afterwards.
    Its tensors are attached to the graph. What gradient checkpointing runs again in `backward` is not recorded: the
    tensors stay those of the forward, so that a loss on them has the gradients it has without checkpointing. The hooks
    are removed on exit. A model that was compiled before does not run them. Cost: the memory of inputs and outputs.

    Raises:
        ValueError: the model has no module of that name.
    """
    with _capture(pipe_or_model, site_names, SiteCall) as calls:
        yield calls


@contextmanager
def capture_outputs(pipe_or_model: Any, site_names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """As `capture_sites`, the outputs (b, l, d) alone."""
    with _capture(pipe_or_model, site_names, lambda _input, output, _grid: output) as outputs:
        yield outputs


def replay(pipe_or_model: Any, site_name: str, call: SiteCall) -> Tensor:
    """Run the attention layer at a site, as it is mounted now, on a recorded input: tokens (b, l, d).

    Raises:
        ValueError: the model has no module of that name.
    """
    return call_layer(_find_layer(find_host(pipe_or_model).model, site_name), call.input, call.grid)


@contextmanager
def _capture(
    pipe_or_model: Any, site_names: Iterable[str], make: Callable[[Tensor, Tensor, GridSize | None], T]
) -> Iterator[dict[str, T]]:
    host = find_host(pipe_or_model)
    records: dict[str, T] = {}
    grids: dict[str, GridSize | None] = {}

    def record(name: str, source: str, _module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        if name not in records:  # a second call within one forward is gradient checkpointing's
            tokens = args[0] if args else kwargs["hidden_states"]
            records[name] = make(tokens, output, grids.get(source))

    def measure(source: GridSource, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        grids[source.module_name] = source.measure(args, kwargs)

    with ExitStack() as stack:
        stack.callback(host.model.register_forward_pre_hook(lambda *_: records.clear()).remove)
        for name, layer, source in _layers(host, site_names):
            key = "" if source is None else source.module_name
            stack.callback(layer.register_forward_hook(partial(record, name, key), with_kwargs=True).remove)
            if source is not None and key not in grids:
                grids[key] = None
                outer = host.model.get_submodule(key)
                stack.callback(outer.register_forward_pre_hook(partial(measure, source), with_kwargs=True).remove)
        yield records


def _layers(host: Host, site_names: Iterable[str]) -> list[tuple[str, nn.Module, GridSource | None]]:
    return [(name, _find_layer(host.model, name), host.grid_source(name)) for name in site_names]


def _find_layer(model: nn.Module, site_name: str) -> nn.Module:
    try:
        return model.get_submodule(site_name)
    except AttributeError:
        raise ValueError(f"the model has no layer {site_name!r} to capture; find_sites lists the sites") from None
