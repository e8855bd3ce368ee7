"""Find mixers and build them by name: those that ship, installed plug-ins, and plug-in files."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mixers import entries, zoo
from mixers.entries import MixerEntry, register_mixer
from mixers.mixer import TokenMixer
from mixers.plugins import load_installed_plugins
from mixers.suggest import hint, unknown_name
from mixers.traits import Causality, Traits

__all__ = [
    "MixerEntry",
    "create_mixer",
    "get_mixer_entry",
    "list_mixers",
    "load_plugin",
    "mixer_from_state_dict",
    "register_mixer",
]


@cache
def _discover() -> None:
    """Import the mixers that ship and those of installed packages, once per process."""
    zoo.load()
    load_installed_plugins("mixers", "mixers")


def load_plugin(path: str | Path) -> list[str]:
    """Run a Python file that registers mixers.

    Args:
        path: a .py file.

    Returns:
        The names that it registers.

    Raises:
        ValueError: The file does not exist, fails to run, or registers nothing.
    """
    _discover()
    names_before = set(entries.ENTRIES)
    module = import_plugin(path)
    names = sorted({*names_from(module.__name__), *(set(entries.ENTRIES) - names_before)})
    if not names:
        raise ValueError(f"The plug-in {path} registers no mixer: decorate a TokenMixer with @register_mixer(name).")
    return names


def import_plugin(path: str | Path) -> ModuleType:
    """Run a Python file as a module, whatever it registers.

    Raises:
        ValueError: The file does not exist, or fails to run.
    """
    _discover()
    path = Path(path)
    # The hash keeps json.py from replacing the module json, and a/mine.py from replacing b/mine.py.
    name = f"mixers_plugin_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise ValueError(f"Cannot load the plug-in {path}: expected a .py file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"Cannot load the plug-in {path}: {type(error).__name__}: {error}") from error
    return module


def names_from(module: str) -> list[str]:
    """Return the names of the mixers that a module defines, by the module's name."""
    return sorted(name for name, entry in entries.ENTRIES.items() if entry.mixer.__module__ == module)


def get_mixer_entry(name: str) -> MixerEntry:
    """Look up a registered mixer.

    Raises:
        ValueError: The name is unknown; the message suggests the closest one.
    """
    _discover()
    if name not in entries.ENTRIES:
        raise ValueError(unknown_name("mixer", name, sorted(entries.ENTRIES)))
    return entries.ENTRIES[name]


def list_mixers(pattern: str = "*", **traits: Any) -> list[str]:
    """List the mixers whose name matches a pattern and whose default configuration has these traits.

    Example: `list_mixers("lin*", normalized=True)`.

    Args:
        pattern: shell-style wildcard pattern.
        traits: values of fields of `Traits`.

    Returns:
        Sorted names.

    Raises:
        ValueError: A trait is unknown; the message suggests the closest one.
    """
    _discover()
    fields = sorted(field.name for field in dataclasses.fields(Traits))
    for trait in traits:
        if trait not in fields:
            raise ValueError(unknown_name("trait", trait, fields))
    names = sorted(fnmatch.filter(entries.ENTRIES, pattern))
    return [name for name in names if not traits or _has_traits(entries.ENTRIES[name], traits)]


def _has_traits(entry: MixerEntry, traits: Mapping[str, Any]) -> bool:
    default = entry.default_traits
    return all(getattr(default, name) == value for name, value in traits.items())


def create_mixer(
    name: str,
    dim: int,
    heads: int,
    *,
    causality: Causality | None = None,
    normalize: bool | None = None,
    own_projections: bool = True,
    **options: Any,
) -> TokenMixer:
    """Build a mixer.

    Args:
        name: one of `list_mixers()`.
        dim: model width d.
        heads: number of heads; divides `dim`.
        causality: which tokens each token sees. None: the paper's default.
        normalize: divide each row of the mixing matrix by its sum. None: the paper's default.
        own_projections: create to_q, to_k, to_v and to_out. Otherwise every forward is handed a host's, and the
            defaults of `options` are those of the mixer's drop-in form, which starts from the host's parameters.
        options: other fields of the mixer's configuration.

    Returns:
        The mixer, with new parameters.

    Raises:
        ValueError: The mixer or an option is unknown, a value is not supported, or heads does not divide dim.
    """
    entry = get_mixer_entry(name)
    causality = entry.default_causality if causality is None else causality
    normalize = entry.default_normalize if normalize is None else normalize
    _check_supported(entry, "causality", causality, entry.causalities)
    _check_supported(entry, "normalize", normalize, entry.normalizations)
    fields = {field.name for field in dataclasses.fields(entry.config)} - {"causality", "normalize"}
    for option in options:
        if option not in fields:
            raise ValueError(
                f"{name} has no option {option!r}: expected one of {', '.join(sorted(fields))}.{hint(option, fields)}"
            )
    if heads <= 0 or dim % heads:
        raise ValueError(f"Cannot build {name}: heads={heads} does not divide dim={dim}.")
    if not own_projections:
        options = {**entry.mixer.drop_in_options, **options}
    config = entry.config(causality=causality, normalize=normalize, **options)
    return entry.mixer(config, dim, heads, own_projections=own_projections)


def _check_supported(entry: MixerEntry, option: str, value: Any, supported: tuple[Any, ...]) -> None:
    if value not in supported:
        reason = entry.unsupported.get(str(value), "no such value")
        raise ValueError(
            f"{entry.name} does not support {option}={value!r}: {reason}. "
            f"Expected one of {', '.join(map(str, supported))}."
        )


def mixer_from_state_dict(name: str, state: Mapping[str, Tensor], **options: Any) -> TokenMixer:
    """Build a mixer from the state dict of the paper's block as `transformers`, `mamba_ssm` or `fla` save it.

    Args:
        name: a mixer that defines `TokenMixer.convert_state_dict`.
        state: the block's tensors under their published names; floating-point dtypes are kept.
        options: options that the shapes do not determine; some mixers need `heads`.

    Returns:
        The mixer, with the block's parameters.

    Raises:
        ValueError: The mixer has no converter, or a tensor is missing, unexpected or of the wrong shape; the message
            names each.
    """
    entry = get_mixer_entry(name)
    converted = entry.mixer.convert_state_dict(state, options)
    mixer = create_mixer(name, converted.dim, converted.heads, **converted.options)
    expected = mixer.state_dict()
    faults = [f"{name} is missing" for name in expected if name not in converted.tensors]
    faults += [f"{name} is unexpected" for name in converted.tensors if name not in expected]
    faults += [
        f"{name} is {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
        for name, tensor in converted.tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if faults:
        raise ValueError(f"Cannot build {entry.name} from this state dict: {'; '.join(faults)}.")
    # Assigned, not copied into float32 parameters: blocks in half precision keep the decay's parameters in float32.
    copies = {n: t.clone(memory_format=torch.contiguous_format) for n, t in converted.tensors.items()}
    mixer.load_state_dict(copies, assign=True)
    return mixer
