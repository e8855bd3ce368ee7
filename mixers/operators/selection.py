"""Which backends can run here, which one runs a call, and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from mixers.operators.backend import (
    FORMULATIONS,
    LAST_RESORT,
    Backend,
    OperatorCall,
    backend_names,
    find_backend,
    registered_backends,
)
from mixers.operators.backend_table import preferred_backends
from mixers.operators.compilation import constant_in_graphs
from mixers.suggest import hint

OPERATOR_NAMES = ("linear", "scan", "delta")


class BackendRefusedError(ValueError):
    """A backend that was named cannot run a call."""


@dataclass(frozen=True)
class BackendChoice:
    """Which backend ran a call, and why each preferred backend was skipped.

    Attributes:
        operator: `linear`, `scan` or `delta`.
        causality: of the call.
        backend: the one that ran.
        refused: the reason for every backend that comes before it in the table.
    """

    operator: str
    causality: str
    backend: str
    refused: dict[str, str] = field(default_factory=dict)


_observers: list[list[BackendChoice]] = []


def backends(device: str | None = None) -> dict[str, str]:
    """Return every backend of the operators with "available", or the reason why it cannot run.

    Args:
        device: type of the device; None: `cuda` if there is a GPU, otherwise `cpu`.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    availability = {}
    for name in backend_names():
        operators = [operator for operator in OPERATOR_NAMES if name in registered_backends(operator)]
        reasons = [unavailable(operator, name, device) for operator in operators]
        availability[name] = "available" if None in reasons else str(reasons[0])
    return availability


@constant_in_graphs
def unavailable(operator: str, backend: str, device: str) -> str | None:
    """Return why a backend of an operator cannot run on this type of device, whatever the call; None if it can."""
    implementation = find_backend(operator, backend)
    return "there is no such backend" if implementation is None else implementation.unavailable(device)


@contextmanager
def observe_backends() -> Iterator[list[BackendChoice]]:
    """Collect a `BackendChoice` for every call of an operator inside, in order; works for whole models too.

    Calls in a compiled graph are collected when the graph is traced.
    """
    choices: list[BackendChoice] = []
    _observers.append(choices)
    try:
        yield choices
    finally:
        # By identity: lists with the same choices are equal.
        del _observers[next(i for i, observer in enumerate(_observers) if observer is choices)]


def select_backend(name: str, call: OperatorCall) -> Backend[Any]:
    """Return the backend of that name or, for `auto`, the first of the table that does not refuse the call.

    Raises:
        BackendRefusedError: The operator has no such backend, or it cannot compute the call.
    """
    reason: str | None
    if name != "auto":
        reason = _reason_against(name, call)
        if reason is not None:
            others = ", ".join(other for other in registered_backends(call.operator) if other != name)
            end = "" if reason.endswith("?") else "."
            raise BackendRefusedError(
                f"backend={name!r} cannot run this call of the {call.operator} operator: {reason}{end} "
                f"Use auto, or another of {others}."
            )
        _record(BackendChoice(call.operator, call.causality, name))
        return _backend(name, call)
    refused: dict[str, str] = {}
    preferred = preferred_backends(call.operator, str(call.device), call.causality, call.decay)
    for candidate, longest in (*preferred, (LAST_RESORT, None)):
        if longest is not None and call.length > longest:
            reason = f"the table prefers others beyond {longest} tokens"
        else:
            reason = _reason_against(candidate, call)
        if reason is None:
            break
        refused[candidate] = reason
    _record(BackendChoice(call.operator, call.causality, candidate, refused))
    return _backend(candidate, call)


def _backend(name: str, call: OperatorCall) -> Backend[Any]:
    backend = find_backend(call.operator, name)
    assert backend is not None
    return backend


def _reason_against(name: str, call: OperatorCall) -> str | None:
    backend = find_backend(call.operator, name)
    if backend is None:
        if name in backend_names():
            return f"the {call.operator} operator has no such backend"
        return "there is no such backend." + hint(name, backend_names())
    reason = unavailable(call.operator, name, call.device.type)
    if reason is not None or name in FORMULATIONS:
        return reason
    return backend.refuses(call)


def _record(choice: BackendChoice) -> None:
    if not torch.compiler.is_compiling():
        for choices in _observers:
            choices.append(choice)
