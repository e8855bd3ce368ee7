"""The operators' own contract: every formulation is the same map, forward and backward, streamed or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
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
from mixers.operators.backend import FORMULATIONS, kernel_names
from mixers.operators.selection import BackendRefusedError, backends
from mixers.testing.inputs import Inputs, apply_matrix
from mixers.testing.tolerances import assert_close
from mixers.traits import CAUSALITIES, Causality

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class OperatorCase:
    """An operator and how to try it.

    Attributes:
        name: of the case.
        run: (**tensors, causality=…, [normalize=…,] backend=…) -> (b, l, h, v); causal ones also take and give a state.
        weights: (**tensors without the values, causality=…, [normalize=…]) -> the matrix.
        make: (generator, b, l, k, v) -> its tensors in float64, by the names of its arguments; k and v have defaults.
        values: the name of the tensor that the matrix is applied to.
        over_tokens: the names of the tensors that have an axis of tokens, their second.
        causalities, normalizations: what it can be asked for; (None,) where it takes no `normalize`.
        settings: what every call gets besides.
        skip: the name of a tensor D with the result's channels, where the result is W v + D · v.
    """

    name: str
    run: Callable[..., Any]
    weights: Callable[..., Tensor]
    make: Callable[..., Tensors]
    over_tokens: tuple[str, ...]
    values: str = "v"
    causalities: tuple[Causality, ...] = CAUSALITIES
    normalizations: tuple[bool | None, ...] = (True, False)
    settings: dict[str, Any] = field(default_factory=dict)
    skip: str | None = None

    def __str__(self) -> str:
        return self.name

    def switches(self, *causalities: Causality) -> Iterator[dict[str, Any]]:
        """Every causality × normalization; of these causalities where some are given."""
        chosen = [c for c in self.causalities if c in causalities] if causalities else self.causalities
        for causality, normalize in itertools.product(chosen, self.normalizations):
            asked = {} if normalize is None else {"normalize": normalize}
            yield {"causality": causality, **asked, **self.settings}

    def inputs(self, inputs: Inputs, length: int) -> Tensors:
        """Its tensors for these inputs."""
        tensors = self.make(torch.Generator().manual_seed(inputs.seed), inputs.batch, length)
        return {name: tensor.to(inputs.device) for name, tensor in tensors.items()}

    def matrix(self, tensors: Tensors, **switches: Any) -> Tensor:
        """Its matrix from the formula."""
        return self.weights(**{n: t for n, t in tensors.items() if n not in (self.values, self.skip)}, **switches)


HEADS, KEY, VALUE, WIDE = 2, 5, 3, 48
Make = Callable[..., Tensors]


def _spread(generator: torch.Generator, *shape: int) -> Tensor:
    """Log decays between −1e-6 and −50 a step, all magnitudes alike."""
    return -torch.empty(shape, dtype=torch.float64).uniform_(-13.8, 3.9, generator=generator).exp()


def _linear(decay: str) -> Make:
    def make(generator: torch.Generator, b: int, length: int, k: int = KEY, v: int = VALUE) -> Tensors:
        normal = _normal(generator, b, length)
        sizes = {"b": b, "l": length, "h": HEADS, "k": k}
        gates = {"log_decay": _spread(generator, *(sizes[axis] for axis in decay))} if decay else {}
        return {"q": normal(k).exp(), "k": normal(k).exp(), "v": normal(v), **gates}

    return make


def _scan(generator: torch.Generator, b: int, length: int, k: int = KEY, v: int = VALUE) -> Tensors:
    normal = _normal(generator, b, length)
    rates = torch.empty(HEADS, v, k, dtype=torch.float64).uniform_(-3, 1, generator=generator)
    step = -_spread(generator, b, length, HEADS, v)
    skip = torch.randn(HEADS, v, generator=generator, dtype=torch.float64)
    return {"u": normal(v), "dt": step, "A": -rates.exp(), "B": normal(k).exp(), "C": normal(k).exp(), "D": skip}


def _delta(decay: str) -> Make:
    def make(generator: torch.Generator, b: int, length: int, k: int = KEY, v: int = VALUE) -> Tensors:
        normal = _normal(generator, b, length)
        sizes = {"b": b, "l": length, "h": HEADS}
        gates = {"log_decay": _spread(generator, *(sizes[axis] for axis in decay))} if decay else {}
        keys, beta = F.normalize(normal(k), dim=-1), normal(1).squeeze(-1).sigmoid()
        return {"q": normal(k), "k": keys, "v": normal(v), "beta": beta, **gates}

    return make


def _normal(generator: torch.Generator, b: int, length: int) -> Callable[[int], Tensor]:
    return lambda width: torch.randn(b, length, HEADS, width, generator=generator, dtype=torch.float64)


def _cases() -> Iterator[OperatorCase]:
    settings = {"eps": 1e-3, "scale": 0.3}
    for decay in ("", "h", "blh", "blhk"):
        over = ("q", "k", "v") + (("log_decay",) if "l" in decay else ())
        name = linear_attention.__name__ + (f" with log_decay ({', '.join(decay)})" if decay else "")
        yield OperatorCase(name, linear_attention, linear_attention_matrix, _linear(decay), over, settings=settings)
    over = ("u", "dt", "B", "C")
    yield OperatorCase(
        selective_scan.__name__,
        selective_scan,
        selective_scan_matrix,
        _scan,
        over,
        values="u",
        settings=settings,
        skip="D",
    )
    for decay in ("", "h", "blh"):
        over = ("q", "k", "v", "beta") + (("log_decay",) if "l" in decay else ())
        name = delta_rule.__name__ + (f" with log_decay ({', '.join(decay)})" if decay else "")
        yield OperatorCase(
            name,
            delta_rule,
            delta_rule_matrix,
            _delta(decay),
            over,
            causalities=("causal", "bidirectional"),
            normalizations=(None,),
            settings={"scale": 0.3},
        )


INTERPRETED = 65  # tokens up to which kernels are tried on a CPU, at two lengths: an interpreter runs them there

SHORT = 40  # tokens up to which second derivatives and function transforms are tried: more than one chunk

OPERATORS: dict[str, OperatorCase] = {case.name: case for case in _cases()}
"""The library's operators, as cases for `check_operator`."""


def check_formulations_agree(case: OperatorCase, inputs: Inputs) -> None:
    """dense, recurrent and chunked: the same result, and the same gradient of every tensor."""
    for length, switches in itertools.product(inputs.lengths, case.switches()):
        outcomes = {backend: _outcome(case, inputs, length, backend=backend, **switches) for backend in FORMULATIONS}
        for backend in FORMULATIONS[1:]:
            for name, wanted in outcomes["dense"].items():
                what = f"{backend} against dense, {name}, l = {length}, {_describe(switches)}"
                assert_close(outcomes[backend][name], wanted, what=what)


def check_kernels_agree(case: OperatorCase, inputs: Inputs) -> None:
    """Kernels that can run here (on a CPU those of triton, interpreted) give the dense result and gradients too."""
    device = torch.device(inputs.device).type
    available = backends(device)
    kernels = [name for name in kernel_names() if available[name] == "available"]
    short = [length for length in inputs.lengths if length <= INTERPRETED]
    lengths = inputs.lengths if device != "cpu" else sorted({min(short), max(short)}) if short else ()
    for backend, length, switches in itertools.product(kernels, lengths, case.switches()):
        try:
            outcome = _outcome(case, inputs, length, backend=backend, **switches)
        except BackendRefusedError:
            continue
        for name, wanted in _outcome(case, inputs, length, backend="dense", **switches).items():
            what = f"{backend} against dense, {name}, l = {length}, {_describe(switches)}"
            assert_close(outcome[name], wanted, what=what)


def check_equals_its_matrix(case: OperatorCase, inputs: Inputs) -> None:
    """The result is the matrix from the formula, times the values, and what is skipped past it."""
    for length, switches in itertools.product(inputs.lengths, case.switches()):
        tensors = case.inputs(inputs, length)
        values = tensors[case.values]
        wanted = apply_matrix(case.matrix(tensors, **switches), values)
        if case.skip is not None:
            wanted = wanted + tensors[case.skip] * values
        assert_close(case.run(**tensors, **switches), wanted, what=f"result at l = {length}, {_describe(switches)}")


def check_streaming_equals_one_pass(case: OperatorCase, inputs: Inputs) -> None:
    """Causal: a stream in parts, each handed the state of the one before, is one pass; whoever computes the parts."""
    for length, switches in itertools.product(inputs.at_least(2), case.switches("causal")):
        tensors = case.inputs(inputs, length)
        whole, last = case.run(**tensors, **switches, output_final_state=True)
        cut = 1 + inputs.seed % (length - 1)
        for first, second in itertools.product(FORMULATIONS, repeat=2):
            before, after = _part(case, tensors, 0, cut), _part(case, tensors, cut, length)
            start, state = case.run(**before, **switches, backend=first, output_final_state=True)
            end, state = case.run(**after, **switches, backend=second, initial_state=state, output_final_state=True)
            what = f"parts of {cut} ({first}) and {length - cut} ({second}) tokens, {_describe(switches)}"
            assert_close(torch.cat([start, end], dim=1), whole, what=what)
            assert_close(state.memory, last.memory, what=f"state after {what}")
            assert state.tokens == length, f"the state tells {state.tokens} tokens after {length}"


def check_never_looks_ahead(case: OperatorCase, inputs: Inputs) -> None:
    """Causal: later tokens change no earlier result, in any formulation."""
    for length, switches in itertools.product(inputs.at_least(2), case.switches("causal")):
        tensors = case.inputs(inputs, length)
        place = 1 + inputs.seed % (length - 1)
        other = case.inputs(replace(inputs, seed=inputs.seed + 1), length)
        changed = {
            n: torch.cat([t[:, :place], other[n][:, place:]], dim=1) if n in case.over_tokens else t
            for n, t in tensors.items()
        }
        for backend in FORMULATIONS:
            before = case.run(**tensors, **switches, backend=backend)[:, :place]
            after = case.run(**changed, **switches, backend=backend)[:, :place]
            what = f"{backend}, l = {length}, tokens from {place} on changed, {_describe(switches)}"
            assert_close(after, before, what=what)


def check_exact_in_float32(case: OperatorCase, inputs: Inputs) -> None:
    """Decays from −1e-6 to −50 mixed in one sequence lose nothing: float32 is float64 up to its own rounding."""
    for length, switches in itertools.product(inputs.lengths, case.switches()):
        tensors = case.inputs(inputs, length)
        single = {n: t.float() for n, t in tensors.items()}
        truth = case.run(**{n: t.double() for n, t in single.items()}, **switches, backend="recurrent")
        for backend in ("dense", "chunked"):
            y = case.run(**single, **switches, backend=backend)
            error = (y.double() - truth).abs().max() / truth.abs().max()
            what = f"{backend}, l = {length}, {_describe(switches)}"
            assert error < 1e-5, f"{what}: relative error {error:.2g} in float32"


def check_half_precision(case: OperatorCase, inputs: Inputs) -> None:
    """Half-precision tensors: the result has their dtype, and is that of a computation in float32 at least."""
    length = max(inputs.lengths)
    for dtype, switches in itertools.product((torch.bfloat16, torch.float16), case.switches()):
        half = {n: t.to(dtype) for n, t in case.inputs(inputs, length).items()}
        y = case.run(**half, **switches)
        assert y.dtype == dtype, f"the result is {y.dtype}, the tensors are {dtype}"
        truth = case.run(**{n: t.double() for n, t in half.items()}, **switches).to(dtype)
        error = (y.double() - truth.double()).abs().max() / truth.double().abs().max()
        assert error <= 2 * torch.finfo(dtype).eps, f"{dtype}, {_describe(switches)}: relative error {error:.2g}"


def check_gradients(case: OperatorCase, inputs: Inputs) -> None:
    """gradcheck: the gradients of the chunked formulation are those of finite differences."""
    for switches in case.switches():
        tensors = case.make(torch.Generator().manual_seed(inputs.seed), 1, 3)
        names, leaves = list(tensors), [t.requires_grad_() for t in tensors.values()]

        def run(*leaves: Tensor, names: list[str] = names, switches: dict[str, Any] = switches) -> Tensor:
            return case.run(**dict(zip(names, leaves, strict=True)), **switches)

        assert torch.autograd.gradcheck(run, leaves), f"gradcheck fails, {_describe(switches)}"


def check_second_derivatives(case: OperatorCase, inputs: Inputs) -> None:
    """Gradients under create_graph=True can be differentiated again: chunked agrees with recurrent."""
    length = min(max(inputs.lengths), SHORT)
    for switches in case.switches():
        second = {}
        for backend in ("chunked", "recurrent"):
            tensors = {n: t.requires_grad_() for n, t in case.inputs(inputs, length).items()}
            y = case.run(**tensors, **switches, backend=backend)
            first = _gradients((y * _weighting(y)).sum(), tensors.values(), create_graph=True)
            penalty = torch.stack([(gradient.square() * _weighting(gradient)).sum() for gradient in first]).sum()
            second[backend] = _gradients(penalty, tensors.values())
        for name, actual, expected in zip(tensors, second["chunked"], second["recurrent"], strict=True):
            assert_close(actual, expected, what=f"second derivative of {name}, l = {length}, {_describe(switches)}")


def check_function_transforms(case: OperatorCase, inputs: Inputs) -> None:
    """torch.func's vmap, grad and jvp see the same function as a batched call and autograd."""
    length = min(max(inputs.lengths), SHORT)
    for switches in case.switches():
        what = f"l = {length}, {_describe(switches)}"
        tensors = case.inputs(replace(inputs, batch=3), length)
        names = list(tensors)
        axes = tuple(0 if tensors[name].shape[0] == 3 else None for name in names)

        def run(*streams: Tensor, names: list[str] = names, switches: dict[str, Any] = switches) -> Tensor:
            return case.run(**dict(zip(names, streams, strict=True)), **switches)

        def run_item(*item: Tensor, axes: tuple[int | None, ...] = axes, run: Any = run) -> Tensor:
            return run(*(t if axis is None else t[None] for t, axis in zip(item, axes, strict=True)))[0]

        y = run(*tensors.values())
        assert_close(torch.func.vmap(run_item, axes)(*tensors.values()), y, what=f"vmap, {what}")
        weighting = _weighting(y)
        loss = torch.func.grad(lambda *t, run=run, w=weighting: (run(*t) * w).sum(), tuple(range(len(names))))
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        expected = _gradients((run(*leaves) * weighting).sum(), leaves)
        for name, actual, wanted in zip(names, loss(*tensors.values()), expected, strict=True):
            assert_close(actual, wanted, what=f"func.grad of {name}, {what}")
        tangents = tuple(_weighting(t) for t in tensors.values())
        derivative = torch.func.jvp(run, tuple(tensors.values()), tangents)[1]
        along = torch.stack(
            [(gradient * tangent).sum() for gradient, tangent in zip(expected, tangents, strict=True)]
        ).sum()
        assert_close((derivative * weighting).sum(), along, what=f"jvp, {what}")


def check_memory_is_linear(case: OperatorCase, inputs: Inputs) -> None:
    """What backward keeps grows linearly in l, and no tensor of it in l · k · v."""
    for switches in case.switches():
        few, many = (_kept(case, length, switches) for length in (256, 1024))
        assert sum(many) <= 4.4 * sum(few), f"4 times the tokens keep {sum(many) / sum(few):.1f} times as much"
        most = 1024 * HEADS * WIDE**2
        assert max(many) < most, f"a tensor of {max(many):,} numbers is kept; l · h · k · v is {most:,}"


def _kept(case: OperatorCase, length: int, switches: dict[str, Any]) -> list[int]:
    """Sizes of the tensors that backward keeps, the operator's own inputs apart, for wide keys and values."""
    tensors = {
        n: t.requires_grad_() for n, t in case.make(torch.Generator().manual_seed(0), 1, length, WIDE, WIDE).items()
    }
    own = {t.untyped_storage().data_ptr() for t in tensors.values()}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = case.run(**tensors, **switches)
    del y
    return [*kept.values(), 1]


def _outcome(case: OperatorCase, inputs: Inputs, length: int, **switches: Any) -> Tensors:
    tensors = {n: t.requires_grad_() for n, t in case.inputs(inputs, length).items()}
    y = case.run(**tensors, **switches)
    gradients = _gradients((y * _weighting(y)).sum(), tensors.values())
    return {"y": y, **{f"d{n}": g for n, g in zip(tensors, gradients, strict=True)}}


def _part(case: OperatorCase, tensors: Tensors, start: int, stop: int) -> Tensors:
    return {n: t[:, start:stop] if n in case.over_tokens else t for n, t in tensors.items()}


def _gradients(loss: Tensor, leaves: Iterable[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """The gradients of a loss; zeros for tensors that it does not depend on."""
    return torch.autograd.grad(loss, list(leaves), create_graph=create_graph, allow_unused=True, materialize_grads=True)


def _weighting(like: Tensor) -> Tensor:
    """A different factor for every element."""
    return torch.sin(torch.arange(like.numel(), dtype=like.dtype, device=like.device)).view(like.shape)


def _describe(switches: dict[str, Any]) -> str:
    normalize = switches.get("normalize")
    return switches["causality"] + ("" if normalize is None else ", normalized" if normalize else ", not normalized")


OPERATOR_CHECKS: tuple[Callable[[OperatorCase, Inputs], None], ...] = (
    check_formulations_agree,
    check_equals_its_matrix,
    check_streaming_equals_one_pass,
    check_never_looks_ahead,
    check_exact_in_float32,
    check_half_precision,
    check_gradients,
    check_second_derivatives,
    check_function_transforms,
    check_memory_is_linear,
    check_kernels_agree,
)


def check_operator(case: str | OperatorCase, inputs: Inputs | None = None) -> list[str]:
    """Run every check of an operator, for every causality and normalization; returns the names of the checks.

    Args:
        case: a name in OPERATORS, or a case of your own.
        inputs: lengths, batch and seed.

    Raises:
        AssertionError: formulations disagree, or a promise is broken.
        KeyError: no such operator.
    """
    chosen = OPERATORS[case] if isinstance(case, str) else case
    for check in OPERATOR_CHECKS:
        check(chosen, inputs or Inputs())
    return [check.__name__ for check in OPERATOR_CHECKS]
