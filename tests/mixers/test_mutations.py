"""The suite catches broken operators: each mutation changes one thing in one module, and has to fail."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import pytest

from mixers.testing import OPERATOR_CHECKS, OPERATORS, CheckInputs, operator_checks

OPERATOR_FUNCTIONS = {"linear": "linear_attention", "scan": "selective_scan", "delta": "delta_rule"}


@dataclass(frozen=True)
class Mutation:
    """One change of the source of one module of an operator."""

    operator: str
    module: str
    change: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.operator}-{self.module}-{self.change}".replace(" ", "_")


MUTATIONS = [
    Mutation(
        "linear",
        "dense",
        "mask off by one",
        "segment_sums(log_decay).exp().tril()",
        "segment_sums(log_decay).exp().tril(-1)",
    ),
    Mutation("linear", "dense", "reverse decay a step late", "log_decay[:, :1], log_decay[:, :-1]", "log_decay"),
    Mutation("linear", "recurrent", "decay after the write", "memory = decayed + k", "memory = memory + k"),
    Mutation("linear", "recurrent", "reads before it writes", "memory if diagonal else decayed", "decayed"),
    Mutation("linear", "backend", "eps on the sum, not the mean", "not is_mean and call.log_decay is None", "False"),
    Mutation("linear", "backend", "gate of the token before", "k * log_decay.exp()", "k * log_decay.exp().roll(1, 1)"),
    Mutation(
        "linear",
        "chunks",
        "mask off by one",
        "mask = segment_sums(log_decay).exp_()",
        "mask = segment_sums(log_decay).exp_().tril(-1)",
    ),
    Mutation("linear", "chunks", "weights do not decay", "(scores * mask) @ v", "scores @ v"),
    Mutation("linear", "chunks", "keys decay a step late", "v * to_end", "v * to_end * log_decay.exp()"),
    Mutation(
        "linear", "chunks", "state does not decay", "torch.addcmul(addition, decay[i], memory)", "memory + addition"
    ),
    Mutation(
        "linear",
        "chunks",
        "states a chunk late",
        "torch.stack(before), memory",
        "torch.stack(before[1:] + [memory]), memory",
    ),
    Mutation("linear", "channel_gates", "queries miss their own gate", "rows = q * gates", "rows = q"),
    Mutation(
        "linear",
        "channel_gates",
        "smallest halves left out",
        "_lower_quarters(scores, half).copy_(",
        "half > 1 and _lower_quarters(scores, half).copy_(",
    ),
    Mutation("linear", "chunked", "sum instead of mean", "k / k.shape[1]", "k"),
    Mutation(
        "linear",
        "chunked",
        "undecayed sums scaled by the heads",
        "self.noncausal(q, k, v) * q.shape[1]",
        "self.noncausal(q, k, v) * q.shape[2]",
    ),
    Mutation(
        "linear",
        "noncausal_blocks",
        "eps outside the mean",
        "keepdim=True) + settings.eps).reciprocal_()",
        "keepdim=True)).reciprocal_() + settings.eps",
    ),
    Mutation("linear", "noncausal_blocks", "sum instead of mean", "key_mean = key_mean / k.shape[1]", "pass"),
    Mutation(
        "linear",
        "noncausal_blocks",
        "keys without their gates",
        "keys = keys * _heads_first(log_decay, block, dtype).exp()",
        "pass",
    ),
    Mutation(
        "linear",
        "noncausal_blocks",
        "row sums are constants",
        "gradient.addcmul_(shares, key_mean[block[0]])",
        "pass",
    ),
    Mutation("linear", "noncausal_blocks", "row sums cost keys nothing", ".add_(d_key_mean[block[0]])", ""),
    Mutation(
        "linear",
        "noncausal_blocks",
        "gradient of half a block",
        "d_memory[block[0]] += queries.mT @ errors",
        "d_memory[block[0]] = queries.mT @ errors",
    ),
    Mutation("linear", "ordered_blocks", "eps on the sum, not the mean", "self.eps * per_token", "self.eps"),
    Mutation("linear", "ordered_blocks", "reverse pass restarts", "v, memory, diagonal=F", "v, 0 * memory, diagonal=F"),
    Mutation("linear", "ordered_blocks", "diagonal counted twice", "memory, diagonal=False)", "memory, diagonal=True)"),
    Mutation("linear", "ordered_blocks", "first block first", "backwards=True", "backwards=False"),
    Mutation("scan", "dense", "decay a step early", "rows.tril(-1).cumsum(-2)", "rows.tril().cumsum(-2)"),
    Mutation("scan", "dense", "weights without the step", "total * dt.permute(0, 2, 3, 1)[..., None, :]", "total"),
    Mutation(
        "scan", "recurrent", "decay after the write", "memory = decayed + _addition", "memory = memory + _addition"
    ),
    Mutation("scan", "backend", "eps outside the fraction", "values / (row_sums + eps)", "values / row_sums + eps"),
    Mutation("scan", "operator", "skip subtracted", "y if D is None else y + D", "y if D is None else y - D"),
    Mutation(
        "scan", "chunked", "decay a step late", "_decay(dt[..., None, :], A)", "_decay(dt.roll(1, 1)[..., None, :], A)"
    ),
    Mutation("scan", "chunked", "state does not decay in a chunk", "_decay(dt.cumsum(2), A)", "_decay(0 * dt, A)"),
    Mutation("scan", "chunked", "weights without the gate", "(gates * additions).sum(1)", "additions.sum(1)"),
    Mutation(
        "scan",
        "chunked",
        "gates cost nothing",
        "return d_additions * _previous(start, states), d_additions, carried",
        "return 0 * d_additions, d_additions, carried",
    ),
    Mutation("delta", "dense", "reads before it erases", "rows - column[..., None]", "rows - 0 * column[..., None]"),
    Mutation("delta", "recurrent", "erases before it decays", "k[:, i], decayed)", "k[:, i], memory)"),
    Mutation("delta", "recurrent", "writes without strength", "write_key * v[", "k[:, i, :, :, None] * v["),
    Mutation("delta", "chunked", "mask off by one", "tril(0 if diagonal else -1)", "tril(-1)"),
    Mutation(
        "delta",
        "chunked",
        "decay a step late",
        "since_start = g.cumsum(-2).exp()",
        "since_start = (g.cumsum(-2) - g).exp()",
    ),
    Mutation("delta", "chunked", "system without decay", "(k @ k.mT) * decay", "(k @ k.mT)"),
]


def functions_of(module: ModuleType) -> Iterator[tuple[str, FunctionType]]:
    """Every function that a module defines, methods included, by its qualified name."""
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    for owner in (module, *classes):
        for value in vars(owner).values():
            function = inspect.unwrap(value.fget if isinstance(value, property) else getattr(value, "__func__", value))
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                yield function.__qualname__, function


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """A code object, and those of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)


def mutate(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exchange the code of the module's functions, wherever they are used, by that of the changed source."""
    shared = f"mixers.operators.{mutation.module}"
    own = f"mixers.operators.{mutation.operator}.{mutation.module}"
    module = importlib.import_module(own if importlib.util.find_spec(own) else shared)
    path = Path(inspect.getfile(module))
    source = path.read_text(encoding="utf-8")
    assert source.count(mutation.old) == 1, f"{path.name} has {source.count(mutation.old)} times {mutation.old!r}"
    changed = compile(source.replace(mutation.old, mutation.new), str(path), "exec", dont_inherit=True)
    codes = {code.co_qualname: code for code in codes_in(changed)}
    for name, function in functions_of(module):
        if name in codes:
            monkeypatch.setattr(function, "__code__", codes[name])


def first_failure(function: str) -> str:
    """The first error of the operator's checks; empty if all pass."""
    cases = [case for case in OPERATORS.values() if case.name.split()[0] == function]
    for check in OPERATOR_CHECKS:  # those that catch most come first
        for case in cases:
            try:
                check(case, CheckInputs((2, 37), batch=1))
            except (AssertionError, RuntimeError) as error:
                return f"{check.__name__}, {case.name}: {error}"
    return ""


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are not mutated, and slow to interpret."""
    monkeypatch.setattr(operator_checks, "kernel_names", tuple)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_is_caught(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(mutation, monkeypatch)
    caught = first_failure(OPERATOR_FUNCTIONS[mutation.operator])
    assert caught, f"not noticed: {mutation.change}"
    print(f"{mutation}: {caught}")
