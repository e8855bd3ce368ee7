"""The library's operators as cases for `check_operator`: how to call each, and how to make its tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixers.operators import (
    delta_rule,
    delta_rule_matrix,
    linear_attention,
    linear_attention_matrix,
    selective_scan,
    selective_scan_matrix,
)
from mixers.testing.inputs import CheckInputs
from mixers.traits import CAUSALITIES, Causality

NamedTensors = dict[str, Tensor]
TensorFactory = Callable[..., NamedTensors]

HEADS = 2
KEY = 5
VALUE = 3


@dataclass(frozen=True)
class OperatorCase:
    """An operator and how to check it.

    Attributes:
        name: of the case.
        run: (**tensors, causality=…, [normalize=…,] backend=…) -> (b, l, h, v); causal calls also take and return a
            state.
        matrix_function: (**tensors without the values, causality=…, [normalize=…]) -> the matrix.
        make: (generator, b, l, k, v) -> its tensors in float64, by the names of its arguments; k and v have defaults.
        over_tokens: the names of the tensors whose second axis is tokens.
        values: the name of the tensor that the matrix is applied to.
        causalities: those that it supports.
        normalizations: those that it supports; (None,) if it takes no `normalize`.
        settings: further arguments of every call.
        skip: the name of a tensor D with the result's channels, if the result is W v + D · v.
    """

    name: str
    run: Callable[..., Any]
    matrix_function: Callable[..., Tensor]
    make: TensorFactory
    over_tokens: tuple[str, ...]
    values: str = "v"
    causalities: tuple[Causality, ...] = CAUSALITIES
    normalizations: tuple[bool | None, ...] = (True, False)
    settings: dict[str, Any] = field(default_factory=dict)
    skip: str | None = None

    def __str__(self) -> str:
        return self.name

    def switches(self, *causalities: Causality) -> Iterator[dict[str, Any]]:
        """Yield every causality × normalization; only these causalities if some are given."""
        selected = [c for c in self.causalities if c in causalities] if causalities else self.causalities
        for causality, normalize in itertools.product(selected, self.normalizations):
            normalization = {} if normalize is None else {"normalize": normalize}
            yield {"causality": causality, **normalization, **self.settings}

    def inputs(self, inputs: CheckInputs, length: int) -> NamedTensors:
        """Return its tensors for these inputs."""
        tensors = self.make(torch.Generator().manual_seed(inputs.seed), inputs.batch, length)
        return {name: tensor.to(inputs.device) for name, tensor in tensors.items()}

    def matrix(self, tensors: NamedTensors, **switches: Any) -> Tensor:
        """Return its matrix from the formula."""
        return self.matrix_function(
            **{n: t for n, t in tensors.items() if n not in (self.values, self.skip)}, **switches
        )


def _draw_log_decays(generator: torch.Generator, *shape: int) -> Tensor:
    """Return log decays between −1e-6 and −50 per step, log-uniform."""
    return -torch.empty(shape, dtype=torch.float64).uniform_(-13.8, 3.9, generator=generator).exp()


def _draw_normal(generator: torch.Generator, b: int, length: int) -> Callable[[int], Tensor]:
    return lambda width: torch.randn(b, length, HEADS, width, generator=generator, dtype=torch.float64)


def _linear_tensors(decay: str) -> TensorFactory:
    def make(generator: torch.Generator, b: int, length: int, k: int = KEY, v: int = VALUE) -> NamedTensors:
        normal = _draw_normal(generator, b, length)
        sizes = {"b": b, "l": length, "h": HEADS, "k": k}
        gates = {"log_decay": _draw_log_decays(generator, *(sizes[axis] for axis in decay))} if decay else {}
        return {"q": normal(k).exp(), "k": normal(k).exp(), "v": normal(v), **gates}

    return make


def _scan_tensors(generator: torch.Generator, b: int, length: int, k: int = KEY, v: int = VALUE) -> NamedTensors:
    normal = _draw_normal(generator, b, length)
    rates = torch.empty(HEADS, v, k, dtype=torch.float64).uniform_(-3, 1, generator=generator)
    dt = -_draw_log_decays(generator, b, length, HEADS, v)
    D = torch.randn(HEADS, v, generator=generator, dtype=torch.float64)
    return {"u": normal(v), "dt": dt, "A": -rates.exp(), "B": normal(k).exp(), "C": normal(k).exp(), "D": D}


def _delta_tensors(decay: str, positive: bool) -> TensorFactory:
    def make(generator: torch.Generator, b: int, length: int, k: int = KEY, v: int = VALUE) -> NamedTensors:
        normal = _draw_normal(generator, b, length)
        sizes = {"b": b, "l": length, "h": HEADS, "k": k}
        gates = {"log_decay": _draw_log_decays(generator, *(sizes[axis] for axis in decay))} if decay else {}
        queries = normal(k).exp() if positive else normal(k)
        keys = normal(k).exp() if positive else normal(k)
        beta = normal(1).squeeze(-1).sigmoid()
        return {"q": queries, "k": F.normalize(keys, dim=-1), "v": normal(v), "beta": beta, **gates}

    return make


def _case_name(function: Callable[..., Any], decay: str) -> str:
    return function.__name__ + (f" with log_decay ({', '.join(decay)})" if decay else "")


def _cases() -> Iterator[OperatorCase]:
    settings = {"eps": 1e-3, "scale": 0.3}
    for decay in ("", "h", "blh", "blhk"):
        yield OperatorCase(
            _case_name(linear_attention, decay),
            linear_attention,
            linear_attention_matrix,
            _linear_tensors(decay),
            ("q", "k", "v") + (("log_decay",) if "l" in decay else ()),
            settings=settings,
        )
    yield OperatorCase(
        selective_scan.__name__,
        selective_scan,
        selective_scan_matrix,
        _scan_tensors,
        ("u", "dt", "B", "C"),
        values="u",
        settings=settings,
        skip="D",
    )
    for decay, normalize in itertools.product(("", "h", "blh", "blhk"), (False, True)):
        yield OperatorCase(
            _case_name(delta_rule, decay) + (", normalized" if normalize else ""),
            delta_rule,
            delta_rule_matrix,
            _delta_tensors(decay, positive=normalize),
            ("q", "k", "v", "beta") + (("log_decay",) if "l" in decay else ()),
            normalizations=(normalize,),
            settings=settings,
        )


OPERATORS: dict[str, OperatorCase] = {case.name: case for case in _cases()}
"""The library's operators, as cases for `check_operator`."""
