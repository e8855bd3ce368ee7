"""The `Backend` protocol: one implementation of one operator, registered under a name.

A backend is one module: in `mixers/operators/<operator>/`, where it is found by itself, or in a package of your own,
which registers it when it is imported, by `mixlab --plugin` or through the entry-point group `mixers.backends`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from mixers.operators.recurrent_state import RecurrentState
from mixers.plugins import load_installed_plugins
from mixers.traits import Causality

FORMULATIONS = ("dense", "recurrent", "chunked")
"""The backends that every operator has and that run on any device."""

LAST_RESORT = "chunked"  # computes every call


@dataclass(frozen=True, kw_only=True)
class OperatorCall:
    """A checked call of an operator, as a backend sees it.

    Attributes:
        causality: which tokens a token sees.
        normalize: whether rows are divided by their sums.
        eps: added to the denominator if `normalize`.
        scale: factor of the result if not `normalize`.
        initial_state: state before the first token of a causal pass, or None.
        output_final_state: whether the caller wants the state after the last token.
    """

    operator: ClassVar[str]
    causality: Causality
    normalize: bool = False
    eps: float = 0.0
    scale: float = 1.0
    initial_state: RecurrentState | None = None
    output_final_state: bool = False

    @property
    def tensors(self) -> Mapping[str, Tensor | None]:
        """The tensors, by the names of the operator's arguments."""
        raise NotImplementedError

    @property
    def decay(self) -> str:
        """`none`, `scalar` (one gate per token and head) or `vector` (one per channel)."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return next(t.device for t in self.tensors.values() if t is not None)

    @property
    def length(self) -> int:
        """The number of tokens."""
        return next(t.shape[1] for t in self.tensors.values() if t is not None)

    @property
    def requires_grad(self) -> bool:
        """Whether gradients of a tensor are wanted."""
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self.tensors.values())

    @property
    def past(self) -> int:
        """The number of tokens before the first one."""
        return self.initial_state.tokens if self.initial_state else 0


CallT = TypeVar("CallT", bound=OperatorCall)
BackendT = TypeVar("BackendT", bound="type[Backend[Any]]")


class Backend(ABC, Generic[CallT]):
    """One implementation of an operator.

    Subclass the operator's own base class (`LinearAttentionBackend`, `SelectiveScanBackend`, `DeltaRuleBackend`), and
    register it with `@register_backend("name")`.

    Attributes:
        operator: `linear`, `scan` or `delta`.
        name: what `backend=` selects it by; set by `register_backend`.
        package: the optional package that it imports when it runs; such a backend runs on CUDA devices only, unless
            it overrides `unavailable`. None: no package is needed.
    """

    operator: ClassVar[str]
    name: ClassVar[str]
    package: ClassVar[str | None] = None

    @abstractmethod
    def run(self, call: CallT) -> tuple[Tensor, Tensor | None]:
        """Compute a call that it does not refuse.

        Returns:
            The result (b, l, h, v) in the dtype of the values, of a `SelectiveScanBackend` in that of the sums; and the
            memory after the last token, or None if the call is not causal.
        """

    def refuses(self, call: CallT) -> str | None:
        """Return the reason why it cannot compute a call, or None if it can."""
        return None

    def unavailable(self, device: str) -> str | None:
        """Return the reason why it cannot run on this type of device at all, or None if it can."""
        if self.package is None:
            return None
        if importlib.util.find_spec(self.package) is None:
            return f"the package {self.package} is not installed"
        return None if device == "cuda" else f"it needs a CUDA device, not {device}"


def triton_unavailable(device: str) -> str | None:
    """Return the reason why Triton kernels cannot run on this type of device, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"it needs a CUDA device, not {device}, unless TRITON_INTERPRET=1 is set before Python starts"


_REGISTRY: dict[str, dict[str, Backend[Any]]] = {}


def register_backend(name: str) -> Callable[[BackendT], BackendT]:
    """Class decorator that registers a `Backend` under `name` for the operator of its base class.

    Raises:
        ValueError: The class is not a backend of an operator, or another class has the name.
    """

    def register(cls: BackendT) -> BackendT:
        if not (isinstance(cls, type) and issubclass(cls, Backend) and hasattr(cls, "operator")):
            raise ValueError(
                f"Cannot register {cls!r} as the backend {name!r}: expected a subclass of LinearAttentionBackend, "
                "SelectiveScanBackend or DeltaRuleBackend."
            )
        registered = _REGISTRY.setdefault(cls.operator, {})
        owner = type(registered[name]) if name in registered else cls
        if (owner.__module__, owner.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"Cannot register {cls.__name__} as the backend {name!r} of the {cls.operator} operator: "
                f"{owner.__module__}.{owner.__qualname__} has that name."
            )
        cls.name = name
        registered[name] = cls()
        return cls

    return register


def backends_from(module: str) -> list[str]:
    """Return the names of the backends that the named module defines, sorted."""
    backends = [backend for registered in _REGISTRY.values() for backend in registered.values()]
    return sorted(backend.name for backend in backends if type(backend).__module__ == module)


def import_backends(package: str) -> None:
    """Import every module of an operator's package, which registers the backends in them."""
    path = importlib.import_module(package).__path__
    for module in pkgutil.iter_modules(path):
        if not module.ispkg:
            importlib.import_module(f"{package}.{module.name}")


def registered_backends(operator: str) -> Mapping[str, Backend[Any]]:
    """Return the backends of an operator by name, those of plug-in packages included; the formulations come first."""
    _load_plugins()
    registered = _REGISTRY[operator]
    return {name: registered[name] for name in (*FORMULATIONS, *sorted(set(registered) - set(FORMULATIONS)))}


def find_backend(operator: str, name: str) -> Backend[Any] | None:
    """Return a backend of an operator, or None if there is none of that name."""
    backend = _REGISTRY[operator].get(name)
    return backend if backend is not None else registered_backends(operator).get(name)


def backend_names() -> tuple[str, ...]:
    """Return the names of the backends of all operators; the formulations come first."""
    names = {name for operator in _REGISTRY for name in registered_backends(operator)}
    return (*FORMULATIONS, *sorted(names - set(FORMULATIONS)))


def kernel_names() -> tuple[str, ...]:
    """Return the names of the backends beside the formulations, which run on some devices only."""
    return backend_names()[len(FORMULATIONS) :]


@cache
def _load_plugins() -> None:
    load_installed_plugins("mixers.backends", "backends")
