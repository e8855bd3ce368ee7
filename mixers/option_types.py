"""Checks that the options of a mixer are of the annotated types, wherever they come from: code, a command, a file."""

from __future__ import annotations

import dataclasses
import math
import numbers
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

DESCRIPTIONS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def check_option_types(config: Any) -> None:
    """Refuse options of another type than their dataclass declares, before their values are used.

    `gate="false"` would otherwise add a gate, and `conv_size="3"` fail somewhere inside.

    Args:
        config: a dataclass; fields whose types are combinations of `bool`, `int`, `float`, `str`, names and None are
            checked.

    Raises:
        ValueError: an option has another type, or is a number that is not finite.
    """
    config_class: Any = type(config)
    for name, types in option_types(config_class).items():
        value = getattr(config, name)
        if not any(_is_of(value, kind) for kind in types):
            expected = " or ".join(DESCRIPTIONS.get(kind, "none") for kind in types)
            raise ValueError(f"Expected {name} to be {expected}, got {value!r:.80}.")


@cache
def option_types(config_class: Any) -> dict[str, tuple[type, ...]]:
    """The simple types that each field may have; fields of any other type are left out."""
    try:
        hints = get_type_hints(config_class)
    except NameError:  # a class that is defined in a function, of types that are defined there
        return {}
    types = {field.name: _simple_types(hints[field.name]) for field in dataclasses.fields(config_class)}
    return {name: kinds for name, kinds in types.items() if kinds}


def _simple_types(hint: Any) -> tuple[type, ...]:
    """The types of a hint, those of a Literal's names included; empty if one is not simple."""
    if hint in DESCRIPTIONS or hint is type(None):
        return (hint,)
    kinds: list[type] = []
    for part in get_args(hint):
        added = (type(part),) if get_origin(hint) is Literal else _simple_types(part)
        if not added or added[0] not in (*DESCRIPTIONS, type(None)):
            return ()
        kinds += added
    return tuple(dict.fromkeys(kinds))


def _is_of(value: Any, kind: type) -> bool:
    """Whether a value has a type; numbers may be those of another library, and a number is not a truth value."""
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool) and _is_finite(value)
    return isinstance(value, kind)


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every floating-point number
        return False
