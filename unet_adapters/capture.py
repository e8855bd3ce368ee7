"""The outputs of sites, recorded while a UNet runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from unet_adapters.sites import resolve_unet


@contextmanager
def capture_outputs(unet: Any, site_names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Record what the attention layers at `site_names` put out, mounted or not.

    The dictionary is filled by each forward inside the context and keeps the last one's tensors (b, l, d), attached
    to the graph; it stays readable afterwards. The hooks are gone on exit. A UNet that was compiled before does not
    see them. Cost: the memory of the outputs.

    Raises:
        ValueError: the UNet has no module of that name.
    """
    root = resolve_unet(unet)
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in site_names:
            handle = _layer(root, name).register_forward_hook(partial(_record, outputs, name))
            stack.callback(handle.remove)
        yield outputs


def _record(outputs: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
    outputs[name] = output


def _layer(unet: nn.Module, name: str) -> nn.Module:
    try:
        return unet.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the UNet has no layer {name!r} to capture; find_sites lists the sites") from None
