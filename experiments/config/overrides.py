"""Changes to a configuration from the command line, and clear messages about wrong ones."""

from __future__ import annotations

import json
from types import NoneType
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from experiments.config.distillation import DistillationConfig
from experiments.config.grid import Grid
from mixers.suggest import hint

ConfigT = TypeVar("ConfigT", bound=BaseModel)

SIZES = frozenset({"image_size", "sizes", "shapes", "sample_sizes"})
"""The fields that hold sizes in pixels."""
ROW_FIELDS = (("start", "train", "calibrate_outputs"), ("objectives",))
"""The fields of a distillation for which rows have plans of their own, those that depend on each other in a group."""
OPEN_FIELDS = frozenset({"metrics", "objectives"})
"""Dictionaries by name, to which a setting may add an entry: `evaluation.metrics.mine={}`."""


def apply_overrides(config: ConfigT, settings: list[str]) -> ConfigT:
    """Return a configuration with `dotted.key=value` settings applied and checked; values are JSON, or plain text.

    A number as a key is a position in a list, from 0: `distillation.before.0.fit.steps=50`.

    Raises:
        ValueError: a setting has no `=`, or names no field; the message lists the fields that exist.
    """
    tree = config.model_dump(mode="json")
    for setting in settings:
        path, separator, text = setting.partition("=")
        keys = path.split(".")
        node = tree
        for depth, key in enumerate(keys):
            names = _indices(node)
            is_open = isinstance(node, dict) and OPEN_FIELDS & set(keys[max(0, depth - 2) : depth])
            if separator and key not in names and is_open:
                names[key] = key  # whether an item or a setting of this name exists is checked below
                node[key] = {}
            if not separator or key not in names:
                parent = ".".join(keys[:depth]) or f"the {type(config).__name__.removesuffix('Config').lower()}"
                raise ValueError(
                    f"Cannot set {setting!r}: expected key=value; {parent} has {', '.join(names) or 'nothing'}."
                    f"{hint(key, names)}"
                )
            if depth < len(keys) - 1:
                node = node[names[key]]
        node[names[key]] = _parse_value(text)
    return validate_config(type(config), tree)


def apply_grid_overrides(grid: Grid, settings: list[str]) -> Grid:
    """Apply overrides to a grid; those of `distillation` also apply to every row's own, if it has such a field.

    A row whose own plan differs from the grid's in one of a group of `ROW_FIELDS` keeps that group: it is what the row
    is about.

    Raises:
        ValueError: as `apply_overrides`.
    """
    shared = [setting for setting in settings if setting.startswith("distillation.")]
    own = []
    for number, variant in enumerate(grid.variants):
        if variant.distillation is None:
            continue
        tree = variant.distillation.model_dump(mode="json")
        row_fields = _differing_row_fields(variant.distillation, grid.distillation)
        for setting in shared:
            keys = setting.partition("=")[0].split(".")[1:]
            if keys[0] not in row_fields and _has_field(tree, keys):
                own.append(f"variants.{number}.{setting}")
    return apply_overrides(grid, [*settings, *own])


def _differing_row_fields(row: DistillationConfig, grid: DistillationConfig) -> set[str]:
    groups = [group for group in ROW_FIELDS if any(getattr(row, name) != getattr(grid, name) for name in group)]
    return {name for group in groups for name in group}


def resize_grid(grid: Grid, size: int) -> Grid:
    """Return the grid with `size` pixels as the side of its training images, and every other size in proportion."""
    factor = size / grid.distillation.image_size

    def scale(value: Any) -> Any:
        return [scale(item) for item in value] if isinstance(value, list) else round(value * factor)

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(item) for item in node]
        if not isinstance(node, dict):
            return node
        options = {"options": node["options"]} if "options" in node else {}  # a mixer's `sizes` are not pixels
        return {key: scale(value) if key in SIZES else walk(value) for key, value in node.items()} | options

    return validate_config(Grid, walk(grid.model_dump(mode="json")))


def validate_config(kind: type[ConfigT], tree: Any) -> ConfigT:
    """Build a configuration from plain values.

    Raises:
        ValueError: it is not valid; one sentence that says where, and names the nearest key for an unknown one.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        errors = error.errors()
        # An unknown key comes before the missing one that it misspells.
        first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
        location = ".".join(str(key) for key in first["loc"]) or "it"
        if first["type"] == "extra_forbidden":
            names = _field_names(kind, first["loc"][:-1])
            raise ValueError(
                f"{location} is unknown: expected one of {', '.join(names)}.{hint(str(first['loc'][-1]), names)}"
            ) from None
        raise ValueError(f"{location}: {first['msg'].removeprefix('Value error, ')}") from None


def _has_field(node: Any, keys: list[str]) -> bool:
    for key in keys:
        names = _indices(node)
        if key not in names:
            return False
        node = node[names[key]]
    return True


def _indices(node: Any) -> dict[str, Any]:
    """The keys of a dictionary or the positions of a list, as they are written in a setting -> as they are indexed."""
    if isinstance(node, dict):
        return {str(key): key for key in node}
    return {str(position): position for position in range(len(node))} if isinstance(node, list) else {}


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no JSON, an integer of too many digits, or nested too deeply
        return text


def _field_names(kind: Any, path: tuple[int | str, ...]) -> list[str]:
    """The fields of the model at a path through models, dictionaries and tuples of models."""
    for key in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(key)].annotation
        else:
            kind = next(a for a in reversed(get_args(kind)) if a not in (Ellipsis, NoneType))
    return list(kind.model_fields)
