"""The suite catches broken operators: each mutation changes one thing in one formulation, and has to fail."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mixers.operators import delta, linear, scan
from mixers.operators.linear import chunked
from mixers.operators.linear.call import Backend
from mixers.testing import Inputs
from mixers.testing import operators as checks
from mixers.testing.operators import OPERATORS, check_operator

_UNIQUE = itertools.count()
FUNCTIONS = {linear: "linear_attention", scan: "selective_scan", delta: "delta_rule"}


@dataclass(frozen=True)
class Mutation:
    """One change of the source of one formulation."""

    operator: ModuleType
    file: str
    what: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.operator.__name__.split('.')[-1]}-{self.file}-{self.what}".replace(" ", "_")


MUTATIONS = [
    Mutation(
        linear,
        "dense",
        "mask off by one",
        "segment_sums(log_decay).exp().tril()",
        "segment_sums(log_decay).exp().tril(-1)",
    ),
    Mutation(linear, "dense", "reverse decay a step late", "log_decay[:, :1], log_decay[:, :-1]", "log_decay"),
    Mutation(linear, "recurrent", "decay after the write", "memory = kept + k", "memory = memory + k"),
    Mutation(linear, "recurrent", "reads before it writes", "memory if diagonal else kept", "kept"),
    Mutation(linear, "chunked", "mask off by one", "(q @ k.mT).tril(0 if diagonal else -1)", "(q @ k.mT).tril(-1)"),
    Mutation(linear, "chunked", "weights do not decay", "(weights * steps) @ v", "weights @ v"),
    Mutation(linear, "chunked", "keys decay a step late", "v * to_end", "v * to_end * g.exp()"),
    Mutation(
        linear, "chunked", "state does not decay", "torch.addcmul(addition, kept[i], memory)", "memory + addition"
    ),
    Mutation(
        linear,
        "chunked",
        "states a chunk late",
        "torch.stack(before), memory",
        "torch.stack(before[1:] + [memory]), memory",
    ),
    Mutation(linear, "chunked", "queries miss their own gate", "half = q * gates, k, 1", "half = q, k, 1"),
    Mutation(linear, "chunked", "sum instead of mean", "k / k.shape[1]", "k"),
    Mutation(
        linear,
        "chunked",
        "smallest halves left out",
        "_lower(weights, half).copy_(",
        "half > 1 and _lower(weights, half).copy_(",
    ),
    Mutation(
        linear,
        "blocked",
        "eps outside the mean",
        "keepdim=True) + eps).reciprocal_()",
        "keepdim=True)).reciprocal_() + eps",
    ),
    Mutation(linear, "blocked", "sum instead of mean", "weight / k.shape[1]\n        y", "weight\n        y"),
    Mutation(
        linear, "blocked", "keys without their gates", "keys = keys * _heads(log_decay, place, dtype).exp()", "pass"
    ),
    Mutation(linear, "blocked", "row sums are constants", "gradient.addcmul_(shares, weight[place[0]])", "pass"),
    Mutation(linear, "blocked", "row sums cost keys nothing", ".add_(d_weight[place[0]])", ""),
    Mutation(
        linear,
        "blocked",
        "gradient of half a block",
        "d_memory[place[0]] += queries.mT @ errors",
        "d_memory[place[0]] = queries.mT @ errors",
    ),
    Mutation(linear, "ordered", "eps on the sum, not the mean", "self.eps * told", "self.eps"),
    Mutation(
        linear,
        "ordered",
        "back does not decay",
        "v_back, memory,",
        "v_back, 0 * memory,",
    ),
    Mutation(linear, "ordered", "diagonal counted twice", "memory, diagonal=False)", "memory, diagonal=True)"),
    Mutation(linear, "ordered", "blocks ahead first", "backwards=True", "backwards=False"),
    Mutation(linear, "call", "eps on the sum, not the mean", "normalize and gates is None", "False"),
    Mutation(linear, "call", "gate of the token before", "k * gates.exp()", "k * gates.roll(1, 1).exp()"),
    Mutation(scan, "dense", "decay a step early", "rows.tril(-1).cumsum(-2)", "rows.tril().cumsum(-2)"),
    Mutation(scan, "dense", "weights without the step", "total * dt.permute(0, 2, 3, 1)[..., None, :]", "total"),
    Mutation(scan, "recurrent", "decay after the write", "memory = kept + _addition", "memory = memory + _addition"),
    Mutation(scan, "__init__", "eps outside the fraction", "values / (ones + eps)", "values / ones + eps"),
    Mutation(scan, "__init__", "skip taken off", "y if D is None else y + D", "y if D is None else y - D"),
    Mutation(
        scan, "chunked", "decay a step late", "_decay(dt[..., None, :], A)", "_decay(dt.roll(1, 1)[..., None, :], A)"
    ),
    Mutation(scan, "chunked", "chunk before does not decay", "_decay(dt.cumsum(2), A)", "_decay(0 * dt, A)"),
    Mutation(scan, "chunked", "weights without the gate", "(gates * additions).sum(1)", "additions.sum(1)"),
    Mutation(scan, "chunked", "gates cost nothing", "d_additions * _moved(start, states)", "0 * d_additions"),
    Mutation(delta, "dense", "reads before it erases", "rows - column[..., None]", "rows - 0 * column[..., None]"),
    Mutation(delta, "recurrent", "erases before it decays", "k[:, i], decayed)", "k[:, i], memory)"),
    Mutation(delta, "recurrent", "writes without strength", "writer * v[", "k[:, i, :, :, None] * v["),
    Mutation(delta, "chunked", "mask off by one", "tril(0 if diagonal else -1)", "tril(-1)"),
    Mutation(
        delta,
        "chunked",
        "decay a step late",
        "since_start = g.cumsum(-2).exp()",
        "since_start = (g.cumsum(-2) - g).exp()",
    ),
    Mutation(delta, "chunked", "system without decay", "(k @ k.mT) * decay", "(k @ k.mT)"),
]


def mutated(mutation: Mutation) -> ModuleType:
    """The formulation's module, made anew from its changed source."""
    path = Path(inspect.getfile(mutation.operator)).parent / f"{mutation.file}.py"
    source = path.read_text(encoding="utf-8")
    assert source.count(mutation.old) == 1, f"{path.name} has {source.count(mutation.old)} times {mutation.old!r}"
    source = source.replace(mutation.old, mutation.new).replace('opaque("', f'opaque("mutant_{next(_UNIQUE)}_')
    name = f"{mutation.operator.__name__}.{mutation.file}"
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    exec(compile(source, str(path), "exec"), module.__dict__)
    if mutation.operator is linear:
        module.BLOCK_ELEMENTS = 64  # so that short sequences have several blocks
    return module


def put_in_place(mutation: Mutation, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the operator use a module that was made anew."""
    table = mutation.operator._BACKENDS
    if mutation.file == "blocked":
        whole = {**table["chunked"].whole, "noncausal": module.unordered}
        monkeypatch.setitem(table, "chunked", replace(table["chunked"], whole=whole))
    elif mutation.file == "ordered":
        monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", 64)
        whole = {**table["chunked"].whole, "causal": module.causal, "bidirectional": module.bidirectional}
        monkeypatch.setitem(table, "chunked", replace(table["chunked"], whole=whole))
    elif isinstance(table[mutation.file], Backend):
        monkeypatch.setitem(table, mutation.file, replace(table[mutation.file], sums=module, whole={}))
    else:
        monkeypatch.setitem(table, mutation.file, module)


def with_calls_of(module: ModuleType) -> Callable[..., Any]:
    """linear_attention with another `Call` and `Backend`, while its matrix keeps the real ones."""

    def run(*args: Any, **kwargs: Any) -> Any:
        table = {name: module.Backend(backend.sums) for name, backend in linear._BACKENDS.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear, "Call", module.Call)
            patch.setattr(linear, "_BACKENDS", table)
            return linear.linear_attention(*args, **kwargs)

    return run


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_is_caught(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    module, run = mutated(mutation), None
    if mutation.file == "__init__":
        run = getattr(module, FUNCTIONS[mutation.operator])
    elif mutation.file == "call":
        run = with_calls_of(module)
    else:
        put_in_place(mutation, module, monkeypatch)
    monkeypatch.setattr(checks, "KERNELS", ())  # what is mutated is no kernel, and interpreting them takes long
    caught = ""
    for case in OPERATORS.values():
        if case.name.split()[0] != FUNCTIONS[mutation.operator]:
            continue
        chosen = replace(case, run=run) if run else case
        try:
            check_operator(chosen, Inputs((1, 2, 65), batch=1))
        except (AssertionError, RuntimeError) as error:
            caught = f"{case.name}: {error}"
            break
    assert caught, f"nothing noticed: {mutation.what}"
    print(f"{mutation}: {caught}")
