"""Which backends can run here, which one runs a call, and why.

The formulations run any call. Every other backend has `refuses(problem)`: the reason why it cannot compute it, or None.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mixers.operators.opaque import constant_in_graphs
from mixers.operators.preference import preferred
from mixers.operators.state import State
from mixers.suggest import hint

FORMULATIONS = ("dense", "recurrent", "chunked")
KERNELS = ("triton", "fla", "mamba_ssm")
LAST_RESORT = "chunked"  # refuses nothing


class Refused(ValueError):
    """A named backend cannot run a call."""


@dataclass(frozen=True)
class Problem:
    """What a backend looks at to tell whether it can compute a call.

    Attributes:
        operator: `linear`, `scan` or `delta`.
        tensors: by the names of the operator's arguments; `log_decay` as (b, l, h, 1 or k).
        causality, normalize: as asked; False for an operator that does not normalize.
        return_state, initial_state: as asked.
    """

    operator: str
    tensors: Mapping[str, Tensor | None]
    causality: str
    normalize: bool = False
    return_state: bool = False
    initial_state: State | None = None

    @property
    def stateful(self) -> bool:
        """Whether a state is handed in or wanted back."""
        return self.return_state or self.initial_state is not None

    @property
    def device(self) -> torch.device:
        """Of its tensors."""
        return next(t.device for t in self.tensors.values() if t is not None)

    @property
    def length(self) -> int:
        """The number of tokens."""
        return next(t.shape[1] for t in self.tensors.values() if t is not None)

    @property
    def decay(self) -> str:
        """`none`, `scalar` (one a token and head) or `vector` (one a channel)."""
        if self.operator == "scan":
            return "vector"
        gates = self.tensors.get("log_decay")
        return "none" if gates is None else "scalar" if gates.ndim < 4 or gates.shape[-1] == 1 else "vector"


@dataclass(frozen=True)
class Choice:
    """Which backend ran a call, and why those did not that come before it in the table."""

    operator: str
    causality: str
    backend: str
    refused: dict[str, str] = field(default_factory=dict)


_observers: list[list[Choice]] = []


def backends() -> dict[str, str]:
    """Every backend of the operators -> "available", or the reason why it cannot run here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: unavailable(name, device) or "available" for name in (*FORMULATIONS, *KERNELS)}


@constant_in_graphs
def unavailable(backend: str, device: str) -> str | None:
    """Why a backend cannot run on this type of device, whatever the call; None if it can."""
    if backend in FORMULATIONS:
        return None
    if importlib.util.find_spec(backend) is None:
        return f"the package {backend} is not installed"
    if device == "cuda":
        return None
    if backend != "triton":
        return f"it needs a CUDA device, not {device}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        f"it needs a CUDA device, not {device}, where only its interpreter runs (TRITON_INTERPRET=1 before the start)"
    )


@contextmanager
def observe_backends() -> Iterator[list[Choice]]:
    """Collect a `Choice` for every call of an operator inside, in order; for whole models too.

    Calls in a compiled graph are seen when they are traced.
    """
    seen: list[Choice] = []
    _observers.append(seen)
    try:
        yield seen
    finally:
        _observers.remove(seen)


def choose(implemented: Mapping[str, Any], backend: str, problem: Problem) -> Any:
    """The implementation of a backend that is named, or of the first of the table that does not refuse (`auto`).

    Args:
        implemented: backend -> implementation, of this operator.

    Raises:
        Refused: no such backend of this operator, or it cannot compute the call; the message says why.
    """
    if backend != "auto":
        refusal = _reason(implemented, backend, problem)
        if refusal is not None:
            raise Refused(
                f"backend={backend!r} cannot run this call of the {problem.operator} operator: {refusal}. Use auto, or "
                f"another of {', '.join(name for name in implemented if name != backend)}."
            )
        _note(Choice(problem.operator, problem.causality, backend))
        return implemented[backend]
    refused: dict[str, str] = {}
    order = preferred(problem.operator, str(problem.device), problem.causality, problem.decay)
    for name, bound in (*order, (LAST_RESORT, None)):
        if bound is not None and problem.length > bound:
            reason: str | None = f"the table prefers others beyond {bound} tokens"
        else:
            reason = _reason(implemented, name, problem)
        if reason is None:
            break
        refused[name] = reason
    _note(Choice(problem.operator, problem.causality, name, refused))
    return implemented[name]


def _reason(implemented: Mapping[str, Any], backend: str, problem: Problem) -> str | None:
    if backend not in implemented:
        known = (*FORMULATIONS, *KERNELS)
        return "it has no such formulation" if backend in known else "no such backend." + hint(backend, known)
    reason = unavailable(backend, problem.device.type)
    if reason is not None or backend in FORMULATIONS:
        return reason
    return implemented[backend].refuses(problem)  # type: ignore[no-any-return]


def _note(choice: Choice) -> None:
    if not torch.compiler.is_compiling():
        for seen in _observers:
            seen.append(choice)
