"""What must hold before a model is changed. Each check raises an error that says what to do."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from unet_adapters.hosts import Host
from unet_adapters.mounted_layer import MountedLayer, stock_processor
from unet_adapters.sites import Site


def check_weights(model: nn.Module, layers: Mapping[str, nn.Module], verb: str) -> None:
    """Refuse to `verb` ("mount") while weights are merged with a LoRA or not in memory.

    Args:
        model: the host's model.
        layers: the attention layers in question, by site name.
        verb: for the message.

    Raises:
        RuntimeError: a LoRA is fused; group offloading is on, which keeps a list of the layers it started with; or
            weights of a layer are on the meta device (offloaded, or not loaded).
    """
    for module in model.modules():
        hooks = getattr(module, "_diffusers_hook", None)
        if hooks is not None and hooks.get_hook("group_offloading") is not None:
            raise RuntimeError(
                f"cannot {verb}: group offloading is on; remove its hooks and apply them again afterwards"
            )
    for name, module in model.named_modules():
        if _is_lora(module) and module.merged:
            raise RuntimeError(f"cannot {verb}: a LoRA is fused into {name}; call unfuse_lora() first")
    for name, layer in layers.items():
        if any(parameter.is_meta for parameter in layer.parameters()):
            raise RuntimeError(
                f"cannot {verb}: weights of {name} are on the meta device; load them, or remove the offloading hooks "
                "and apply them again afterwards"
            )


def check_no_lora(student: nn.Module, verb: str) -> None:
    """Refuse to `verb` ("save") a student that a LoRA is part of.

    Raises:
        RuntimeError: a LoRA targets layers of a mixer ("all-linear" does).
    """
    for name, module in student.named_modules():
        if _is_lora(module):
            raise RuntimeError(f"cannot {verb}: a LoRA is on {name}; unload it, or target the attention's own layers")


def _is_lora(module: Any) -> bool:
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # not imported: then there is no LoRA either
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def check_site(host: Host, site: Site, layer: nn.Module) -> None:
    """Refuse a layer that no mixer can be mounted in.

    Raises:
        RuntimeError: it has a mixer already, or its class is not diffusers' own.
        ValueError: a mixer would skip a part of its function, or its processor is not supported.
    """
    if isinstance(layer, MountedLayer):
        raise RuntimeError(f"{site.name} already has a mixer of another adapter: unmount that one first")
    mounted_class = host.mounted_class(layer)
    if mounted_class is None:
        raise RuntimeError(f"{site.name} is a {type(layer).__name__}, not diffusers' own Attention: cannot mount")
    host.check_layer(site, layer)
    mounted_class.require_supported(stock_processor(layer))


def check_not_fused(site: Site, layer: nn.Module, mounted_class: type[MountedLayer], verb: str) -> None:
    """Refuse to exchange projections while the layer runs on a fused copy of them.

    Raises:
        RuntimeError: `fuse_qkv_projections` is in force.
    """
    if mounted_class.is_fused(layer):
        raise RuntimeError(f"cannot {verb}: the projections of {site.name} are fused; call unfuse_qkv_projections()")
