"""Record the inputs and outputs of sites while a model runs, and run a site again on a recorded input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from unet_adapters.hosts import find_host
from unet_adapters.mounted_layer import GRID_ARGUMENT, TEXT_ARGUMENT, GridSize, call_layer, image_output

T = TypeVar("T")

_NOT_RECORDED = {"hidden_states", GRID_ARGUMENT, TEXT_ARGUMENT}


@dataclass(frozen=True)
class SiteCall:
    """One call of a site.

    Attributes:
        input: tokens (b, l, d).
        output: tokens (b, l, d); of joint attention, the image tokens, or all if it gets them in one sequence.
        grid: (height, width) of the image that the tokens are; None if the host does not show it.
        text_tokens: how many tokens of `input` are text, before those of the image; None unless they are in one
            sequence.
        arguments: what else the layer was called with: text tokens, rotary embeddings, masks.
    """

    input: Tensor
    output: Tensor
    grid: GridSize | None
    text_tokens: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Number of image tokens."""
        return self.input.shape[1] - (self.text_tokens or 0)


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
    with _capture(pipe_or_model, site_names, lambda call: call) as calls:
        yield calls


@contextmanager
def capture_outputs(pipe_or_model: Any, site_names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """As `capture_sites`, the outputs (b, l, d) alone."""
    with _capture(pipe_or_model, site_names, lambda call: call.output) as outputs:
        yield outputs


def replay(pipe_or_model: Any, site_name: str, call: SiteCall) -> Tensor:
    """Run the attention layer at a site, as it is mounted now, on a recorded input: tokens (b, l, d).

    Raises:
        ValueError: the model has no module of that name.
    """
    layer = _find_layer(find_host(pipe_or_model).model, site_name)
    return call_layer(layer, call.input, call.grid, call.text_tokens, **call.arguments)


@contextmanager
def _capture(pipe_or_model: Any, site_names: Iterable[str], convert: Callable[[SiteCall], T]) -> Iterator[dict[str, T]]:
    host = find_host(pipe_or_model)
    records: dict[str, T] = {}
    measured: dict[tuple[str, str], Any] = {}

    def record(name: str, _module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if name in records:  # a second call within one forward is gradient checkpointing's
            return
        arguments = {key: value for key, value in kwargs.items() if key not in _NOT_RECORDED}
        call = SiteCall(
            args[0] if args else kwargs["hidden_states"],
            image_output(output),
            measured.get(("grid", name)),
            measured.get(("text", name)),
            arguments,
        )
        records[name] = convert(call)

    def measure(key: tuple[str, str], source: Any, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        measured[key] = source.measure(args, kwargs)

    with ExitStack() as stack:
        stack.callback(host.model.register_forward_pre_hook(lambda *_: records.clear()).remove)
        for name in site_names:
            layer = _find_layer(host.model, name)
            stack.callback(layer.register_forward_hook(partial(record, name), with_kwargs=True).remove)
            sources = {"grid": host.grid_source(name), "text": host.text_source(name)}
            for kind, source in sources.items():
                if source is not None:
                    outer = host.model.get_submodule(source.module_name)
                    hook = partial(measure, (kind, name), source)
                    stack.callback(outer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield records


def _find_layer(model: nn.Module, site_name: str) -> nn.Module:
    try:
        return model.get_submodule(site_name)
    except AttributeError:
        raise ValueError(f"the model has no layer {site_name!r} to capture; find_sites lists the sites") from None
