"""Describe everything about a network that can change its output, in text that is the same in every process.

Weights alone are not enough: causality, normalization and feature maps of mixers, scales and active adapters of LoRA,
scales of IP-Adapters, FreeU and processors are attributes. The description reads the attributes of every module instead
of a list of known ones, so it does not depend on which library defines them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mixers.user_source import is_library_class, source_digest

_MODULE_INTERNALS = set(vars(nn.Module()))
# Attributes of offloading and compilation do not change a result; the config is described by itself.
_IGNORED = {"_hf_hook", "_old_forward", "_compiled_call_impl", "_diffusers_hook", "_internal_dict"}
_PLAIN = bool | int | float | complex | str | bytes | torch.dtype | torch.device | None
_MAX_DEPTH = 10
_OFFLOADING_HOOKS = {
    "group_offloading",
    "layer_execution_tracker",
    "lazy_prefetch_group_offloading",
}  # diffusers' names


def fingerprint(*values: Any) -> str:
    """Return a hash of networks, tensors, images and plain values.

    Cost: for a network on a CPU, about a second per GB of weights.
    """
    digest = hashlib.sha256()
    for line in describe(*values):
        digest.update(line.encode())
        digest.update(b"\n")
    return digest.hexdigest()


def describe(*values: Any) -> list[str]:
    """Return one line for every part of the values; equal lines mean that they compute the same."""
    return list(_Description().of(values, "", 0))


def config_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a diffusers config without the entries that say where and by which version it was saved."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


class _Description:
    """Iterates over the parts of values; every module is described once."""

    def __init__(self) -> None:
        self._modules: set[int] = set()

    def of(self, value: Any, name: str, depth: int) -> Iterator[str]:
        """Yield the lines of a value that is called `name`."""
        if isinstance(value, _PLAIN):
            yield f"{name} {value!r}"
        elif isinstance(value, Tensor):
            yield f"{name} {checksum(value)}"
        elif isinstance(value, Image.Image):
            pixels = hashlib.sha256(value.convert("RGB").tobytes()).hexdigest()
            yield f"{name} image {value.size} {pixels}"
        elif isinstance(value, nn.Module):
            yield from self._network(value, name)
        elif depth > _MAX_DEPTH:
            yield f"{name} {_qualified_name(value)}"
        else:
            yield from self._object(value, name, depth + 1)

    def _object(self, value: Any, name: str, depth: int) -> Iterator[str]:
        if isinstance(value, Mapping):
            yield f"{name} mapping of {len(value)}"
            for key in sorted(value, key=str):
                yield from self.of(value[key], f"{name}[{key!r}]", depth)
        elif isinstance(value, set | frozenset):
            yield f"{name} set {sorted(map(str, value))}"
        elif isinstance(value, Sequence):
            yield f"{name} sequence of {len(value)}"
            for index, item in enumerate(value):
                yield from self.of(item, f"{name}[{index}]", depth)
        elif isinstance(value, functools.partial):
            yield from self.of((value.func, value.args, value.keywords), name, depth)
        else:
            yield f"{name} {_qualified_name(value)}"
            for key, item in sorted(_attributes(value).items()):
                yield from self.of(item, f"{name}.{key}", depth)

    def _network(self, network: nn.Module, name: str) -> Iterator[str]:
        network = getattr(network, "_orig_mod", network)  # out of torch.compile
        if id(network) in self._modules:
            yield f"{name} described before"
            return
        modules = dict(network.named_modules())
        self._modules.update(map(id, modules.values()))
        for path, module in modules.items():
            yield from self._module(module, f"{name}/{path}")

    def _module(self, module: nn.Module, name: str) -> Iterator[str]:
        yield f"{name} {_qualified_name(type(module))} training={module.training}"
        if not is_library_class(type(module)):
            yield f"{name} source {source_digest(type(module))}"
        if isinstance(config := getattr(module, "config", None), Mapping):
            yield from self.of(config_values(config), f"{name}.config", 0)
        for key, value in sorted(vars(module).items()):
            is_cache = isinstance(value, Tensor)  # follows from what is described elsewhere
            if not is_cache and key not in _MODULE_INTERNALS and key not in _IGNORED:
                yield from self.of(value, f"{name}.{key}", 0)
        yield from _describe_hooks(module, name)
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            yield f"{name} hook {_qualified_name(hook)}"
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield f"{name}.{key} {checksum(_stored_value(module, key, tensor))}"


def _describe_hooks(module: nn.Module, name: str) -> Iterator[str]:
    """Yield the lines of diffusers' hooks on a module (layer skipping, caches) and their settings.

    What a hook remembers of earlier calls is no setting: only public attributes with plain values, dataclasses of
    them, and names of functions are described.
    """
    registry = vars(module).get("_diffusers_hook")
    for hook_name, hook in {} if registry is None else registry.hooks.items():
        if hook_name in _OFFLOADING_HOOKS:
            continue
        yield f"{name} hook {hook_name} {_qualified_name(hook)}"
        for key, value in sorted((key, value) for key, value in vars(hook).items() if key[0] != "_"):
            settings = vars(value) if dataclasses.is_dataclass(value) else {"": value}
            for field, setting in sorted(settings.items()):
                if _is_plain(setting):
                    yield f"{name} hook {hook_name}.{key}.{field} {setting!r}"
                elif isinstance(setting, FunctionType):
                    yield f"{name} hook {hook_name}.{key}.{field} {_qualified_name(setting)}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple | list) and all(map(_is_plain, value)))


def checksum(tensor: Tensor) -> str:
    """Return a tensor's dtype and shape, 16 of its values, and the sum of all its bits, which any change changes."""
    head = f"{_qualified_name(type(tensor))} {tensor.dtype} {tuple(tensor.shape)}"
    if tensor.is_meta or tensor.numel() == 0:
        return head
    try:
        bits = _integers(tensor.detach())
    except (RuntimeError, NotImplementedError, TypeError):  # tensor subclasses of quantization libraries
        bits = _integers(tensor.detach().dequantize())
    sample = bits[:: max(1, bits.numel() // 16)].tolist()
    return f"{head} {int(bits.sum(dtype=torch.int64))} {sample}"


def _integers(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as integers (n,)."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    types = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().flatten().view(types[tensor.element_size()])


def _stored_value(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return the values of a weight, also of one that accelerate keeps elsewhere between calls."""
    weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    if tensor.is_meta and weights is not None:
        stored: Tensor = weights[name]
        return stored
    return tensor


def _attributes(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    if isinstance(value, type):
        return {}
    if closure := getattr(value, "__closure__", None):  # of a function that was made inside another one
        return {str(index): cell.cell_contents for index, cell in enumerate(closure)}
    return dict(getattr(value, "__dict__", {}))


def _qualified_name(value: Any) -> str:
    value = value if hasattr(value, "__qualname__") else type(value)
    return f"{value.__module__}.{value.__qualname__}"
