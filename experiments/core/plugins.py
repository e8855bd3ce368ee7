"""Plug-ins: a user's own .py files that register mixers, objectives, metrics, backends and hosts."""

from __future__ import annotations

from pathlib import Path

from experiments.core.registries import REGISTRIES
from mixers import registry as mixers_registry
from mixers.operators.backend import backends_from
from unet_adapters.hosts.base import hosts_from


def load_plugin(path: str | Path) -> list[str]:
    """Run a .py file that registers something; returns what it registered, as "objective huber" or "mixer mine".

    Raises:
        ValueError: there is no such file, it does not run, or it registers nothing.
    """
    before = _registered()
    module = mixers_registry.import_plugin(path).__name__
    defined = {("mixer", name) for name in mixers_registry.names_from(module)}
    defined |= {(registry.kind, name) for registry in REGISTRIES for name in registry.names_from(module)}
    defined |= {("backend", name) for name in backends_from(module)}
    defined |= {("host", name) for name in hosts_from(module)}
    added = sorted(defined | (_registered() - before))
    if not added:
        kinds = ", ".join(["mixer", "backend", "host", *(registry.kind for registry in REGISTRIES)])
        raise ValueError(
            f"The plug-in {path} registers nothing: expected a class with a decorator such as @register_mixer(name) or "
            f"@register_objective(name), for one of {kinds}."
        )
    return [f"{kind} {name}" for kind, name in added]


def _registered() -> set[tuple[str, str]]:
    """Every (kind, name) that is registered now."""
    names = {("mixer", name) for name in mixers_registry.list_mixers()}
    return names | {(registry.kind, name) for registry in REGISTRIES for name in registry.names()}
