"""The operators' contract: every backend computes the same map, forward and backward, in parts or at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mixers.operators.backend import FORMULATIONS, kernel_names
from mixers.operators.selection import BackendRefusedError, backends
from mixers.testing.inputs import CheckInputs, apply_matrix, small_blocks
from mixers.testing.operator_cases import HEADS, OPERATORS, NamedTensors, OperatorCase
from mixers.testing.tolerances import assert_close

WIDE = 48  # channels for which memory is measured
MAX_INTERPRETED = 33  # tokens up to which kernels are checked on a CPU, where an interpreter runs them
SHORT = 40  # tokens up to which second derivatives and function transforms are checked: more than one chunk
LONG = (257, 1021)
OperatorCheck = Callable[[OperatorCase, CheckInputs], None]


def check_formulations_agree(case: OperatorCase, inputs: CheckInputs) -> None:
    """dense, recurrent and chunked give the same result and the same gradient of every tensor, also in small blocks."""
    for length, switches in itertools.product(inputs.lengths, case.switches()):
        outcomes = {backend: _outcome(case, inputs, length, backend=backend, **switches) for backend in FORMULATIONS}
        with small_blocks():
            outcomes["chunked in small blocks"] = _outcome(case, inputs, length, backend="chunked", **switches)
        truth = outcomes.pop("dense")
        for (backend, outcome), (name, expected) in itertools.product(outcomes.items(), truth.items()):
            what = f"{backend} against dense, {name}, l = {length}, {_describe(switches)}"
            assert_close(outcome[name], expected, what=what)


def check_long_sequences(case: OperatorCase, inputs: CheckInputs) -> None:
    """With 257 and 1,021 tokens in many blocks, the result and gradients equal those of recurrent."""
    single = replace(inputs, batch=1)
    for length, switches in itertools.product(LONG, case.switches()):
        with small_blocks(1 << 9):
            outcome = _outcome(case, single, length, backend="chunked", **switches)
        for name, expected in _outcome(case, single, length, backend="recurrent", **switches).items():
            what = f"chunked in blocks against recurrent, {name}, l = {length}, {_describe(switches)}"
            assert_close(outcome[name], expected, what=what)


def check_kernels_agree(case: OperatorCase, inputs: CheckInputs) -> None:
    """The kernels that run here give the dense result and gradients; on a CPU these are Triton's, interpreted."""
    device = torch.device(inputs.device).type
    kernels = _available_kernels(inputs)
    short = [length for length in inputs.lengths if length <= MAX_INTERPRETED]
    lengths = inputs.lengths if device != "cpu" else sorted({min(short), max(short)}) if short else ()
    for backend, length, switches in itertools.product(kernels, lengths, case.switches()):
        try:
            outcome = _outcome(case, inputs, length, backend=backend, **switches)
        except BackendRefusedError:
            continue
        for name, expected in _outcome(case, inputs, length, backend="dense", **switches).items():
            what = f"{backend} against dense, {name}, l = {length}, {_describe(switches)}"
            assert_close(outcome[name], expected, what=what)


def _available_kernels(inputs: CheckInputs) -> list[str]:
    """Return the names of the backends beside the formulations that run on the inputs' device."""
    available = backends(torch.device(inputs.device).type)
    return [name for name in kernel_names() if available[name] == "available"]


def check_equals_its_matrix(case: OperatorCase, inputs: CheckInputs) -> None:
    """The result equals the matrix from the formula times the values, plus the skip."""
    for length, switches in itertools.product(inputs.lengths, case.switches()):
        tensors = case.inputs(inputs, length)
        values = tensors[case.values]
        expected = apply_matrix(case.matrix(tensors, **switches), values)
        if case.skip is not None:
            expected = expected + tensors[case.skip] * values
        assert_close(case.run(**tensors, **switches), expected, what=f"result at l = {length}, {_describe(switches)}")


def check_streaming_equals_one_pass(case: OperatorCase, inputs: CheckInputs) -> None:
    """Causal: a sequence processed in parts, from state to state, equals one pass, for any pair of backends."""
    for length, switches in itertools.product(inputs.at_least(2), case.switches("causal")):
        tensors = case.inputs(inputs, length)
        whole, last = case.run(**tensors, **switches, output_final_state=True)
        cut = 1 + inputs.seed % (length - 1)
        before = _slice_tokens(case, tensors, 0, cut)
        after = _slice_tokens(case, tensors, cut, length)
        for first, second in itertools.product(FORMULATIONS, repeat=2):
            start, state = case.run(**before, **switches, backend=first, output_final_state=True)
            end, state = case.run(**after, **switches, backend=second, initial_state=state, output_final_state=True)
            what = f"parts of {cut} ({first}) and {length - cut} ({second}) tokens, {_describe(switches)}"
            assert_close(torch.cat([start, end], dim=1), whole, what=what)
            assert_close(state.memory, last.memory, what=f"state after {what}")
            assert state.tokens == length, f"the state counts {state.tokens} tokens after {length}"


def check_never_looks_ahead(case: OperatorCase, inputs: CheckInputs) -> None:
    """Causal: later tokens change no earlier result, in any formulation."""
    for length, switches in itertools.product(inputs.at_least(2), case.switches("causal")):
        tensors = case.inputs(inputs, length)
        position = 1 + inputs.seed % (length - 1)
        other = case.inputs(replace(inputs, seed=inputs.seed + 1), length)
        changed = {
            n: torch.cat([t[:, :position], other[n][:, position:]], dim=1) if n in case.over_tokens else t
            for n, t in tensors.items()
        }
        for backend in FORMULATIONS:
            before = case.run(**tensors, **switches, backend=backend)[:, :position]
            after = case.run(**changed, **switches, backend=backend)[:, :position]
            what = f"{backend}, l = {length}, tokens from {position} on changed, {_describe(switches)}"
            assert_close(after, before, what=what)


def check_expanded_tensors(case: OperatorCase, inputs: CheckInputs) -> None:
    """A tensor expanded from one head gives the same result as copies of it, and every head gets its own gradient."""
    length = min(max(inputs.lengths), SHORT)
    for switches in case.switches():
        tensors = case.inputs(inputs, length)
        heads = tensors[case.values].shape[2]
        one_head = {n: t[:, :, :1].expand_as(t) for n, t in tensors.items() if t.ndim > 2 and t.shape[2] == heads}
        copies = _gradients_of(case, tensors | {n: t.clone() for n, t in one_head.items()}, switches)
        views = _gradients_of(case, tensors | one_head, switches)
        for name, expected in copies.items():
            assert_close(views[name], expected, what=f"{name} of expanded tensors, {_describe(switches)}")


def check_empty_batch(case: OperatorCase, inputs: CheckInputs) -> None:
    """An empty batch gives an empty result and gradients of zeros, in every backend that runs here."""
    for backend, switches in itertools.product((*FORMULATIONS, *_available_kernels(inputs)), case.switches()):
        tensors = {n: t[:0] if n in case.over_tokens else t for n, t in case.inputs(inputs, 3).items()}
        try:
            outcome = _gradients_of(case, tensors, switches | {"backend": backend})
        except BackendRefusedError:
            continue
        expected = tensors[case.values].shape
        assert outcome["y"].shape == expected, f"{backend}: {tuple(outcome['y'].shape)}, expected {tuple(expected)}"
        assert not any(t.any() for t in outcome.values()), f"{backend}: gradients of an empty batch are not zero"


def check_exact_in_float32(case: OperatorCase, inputs: CheckInputs) -> None:
    """Log decays from −1e-6 to −50 in one sequence lose no precision: float32 equals float64 up to rounding."""
    for length, switches in itertools.product(inputs.lengths, case.switches()):
        tensors = case.inputs(inputs, length)
        single = {n: t.float() for n, t in tensors.items()}
        truth = case.run(**{n: t.double() for n, t in single.items()}, **switches, backend="recurrent")
        for backend in ("dense", "chunked"):
            y = case.run(**single, **switches, backend=backend)
            error = (y.double() - truth).abs().max() / truth.abs().max()
            what = f"{backend}, l = {length}, {_describe(switches)}"
            assert error < 1e-5, f"{what}: relative error {error:.2g} in float32"


def check_half_precision(case: OperatorCase, inputs: CheckInputs) -> None:
    """Half-precision tensors give a result in their dtype that is computed in at least float32."""
    length = max(inputs.lengths)
    for dtype, switches in itertools.product((torch.bfloat16, torch.float16), case.switches()):
        half = {n: t.to(dtype) for n, t in case.inputs(inputs, length).items()}
        y = case.run(**half, **switches)
        assert y.dtype == dtype, f"the result is {y.dtype}, the tensors are {dtype}"
        truth = case.run(**{n: t.double() for n, t in half.items()}, **switches).to(dtype)
        error = (y.double() - truth.double()).abs().max() / truth.double().abs().max()
        assert error <= 2 * torch.finfo(dtype).eps, f"{dtype}, {_describe(switches)}: relative error {error:.2g}"


def check_gradients(case: OperatorCase, inputs: CheckInputs) -> None:
    """gradcheck: the gradients of the default backend equal finite differences."""
    for switches in case.switches():
        tensors = case.make(torch.Generator().manual_seed(inputs.seed), 1, 3)
        names = list(tensors)
        leaves = [t.requires_grad_() for t in tensors.values()]

        def run(*leaves: Tensor, names: list[str] = names, switches: dict[str, Any] = switches) -> Tensor:
            return case.run(**dict(zip(names, leaves, strict=True)), **switches)

        assert torch.autograd.gradcheck(run, leaves), f"gradcheck fails, {_describe(switches)}"


def check_second_derivatives(case: OperatorCase, inputs: CheckInputs) -> None:
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


def check_function_transforms(case: OperatorCase, inputs: CheckInputs) -> None:
    """torch.func's vmap, grad and jvp agree with a batched call and with autograd."""
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
        gradient = torch.func.grad(lambda *t, run=run, w=weighting: (run(*t) * w).sum(), tuple(range(len(names))))
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        expected = _gradients((run(*leaves) * weighting).sum(), leaves)
        for name, actual, autograd in zip(names, gradient(*tensors.values()), expected, strict=True):
            assert_close(actual, autograd, what=f"func.grad of {name}, {what}")
        tangents = tuple(_weighting(t) for t in tensors.values())
        derivative = torch.func.jvp(run, tuple(tensors.values()), tangents)[1]
        products = [(autograd * tangent).sum() for autograd, tangent in zip(expected, tangents, strict=True)]
        assert_close((derivative * weighting).sum(), torch.stack(products).sum(), what=f"jvp, {what}")


def check_memory_is_linear(case: OperatorCase, inputs: CheckInputs) -> None:
    """The tensors saved for the backward pass grow linearly in l, and none of them has l · k · v elements."""
    for switches in case.switches():
        few = _saved_elements(case, 256, switches)
        many = _saved_elements(case, 1024, switches)
        assert sum(many) <= 4.4 * sum(few), f"4 times the tokens save {sum(many) / sum(few):.1f} times as much"
        bound = 1024 * HEADS * WIDE**2
        assert max(many) < bound, f"a tensor of {max(many):,} elements is saved; l · h · k · v is {bound:,}"


def _saved_elements(case: OperatorCase, length: int, switches: dict[str, Any]) -> list[int]:
    """Return the sizes of the tensors saved for backward, except the operator's own inputs, for wide heads."""
    tensors = case.make(torch.Generator().manual_seed(0), 1, length, WIDE, WIDE)
    own = {t.requires_grad_().untyped_storage().data_ptr() for t in tensors.values()}
    saved: dict[int, int] = {}

    def record(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t):
        y = case.run(**tensors, **switches)
    del y
    return [*saved.values(), 1]


def _outcome(case: OperatorCase, inputs: CheckInputs, length: int, **switches: Any) -> NamedTensors:
    return _gradients_of(case, case.inputs(inputs, length), switches)


def _gradients_of(case: OperatorCase, tensors: NamedTensors, switches: dict[str, Any]) -> NamedTensors:
    """Return the result `y`, and the gradient `d<name>` of every tensor."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = case.run(**leaves, **switches)
    gradients = _gradients((y * _weighting(y)).sum(), leaves.values())
    return {"y": y, **{f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}}


def _gradients(loss: Tensor, leaves: Iterable[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """Return the gradients of a loss; zeros for tensors that it does not depend on."""
    return torch.autograd.grad(loss, list(leaves), create_graph=create_graph, allow_unused=True, materialize_grads=True)


def _slice_tokens(case: OperatorCase, tensors: NamedTensors, start: int, stop: int) -> NamedTensors:
    return {n: t[:, start:stop] if n in case.over_tokens else t for n, t in tensors.items()}


def _weighting(like: Tensor) -> Tensor:
    """Return a different factor for every element."""
    return torch.sin(torch.arange(like.numel(), dtype=like.dtype, device=like.device)).view(like.shape)


def _describe(switches: dict[str, Any]) -> str:
    normalize = switches.get("normalize")
    return switches["causality"] + ("" if normalize is None else ", normalized" if normalize else ", not normalized")


OPERATOR_CHECKS: tuple[OperatorCheck, ...] = (
    check_formulations_agree,
    check_equals_its_matrix,
    check_function_transforms,
    check_streaming_equals_one_pass,
    check_never_looks_ahead,
    check_exact_in_float32,
    check_half_precision,
    check_gradients,
    check_second_derivatives,
    check_expanded_tensors,
    check_empty_batch,
    check_long_sequences,
    check_memory_is_linear,
    check_kernels_agree,
)


def check_operator(case: str | OperatorCase, inputs: CheckInputs | None = None) -> list[str]:
    """Run every check of an operator, for every causality and normalization; returns the names of the checks.

    Args:
        case: a name in OPERATORS, or a case of your own.
        inputs: lengths, batch size and seed.

    Raises:
        AssertionError: Backends disagree, or another promise is broken.
        KeyError: There is no such operator.
    """
    operator = OPERATORS[case] if isinstance(case, str) else case
    for check in OPERATOR_CHECKS:
        check(operator, inputs or CheckInputs())
    return [check.__name__ for check in OPERATOR_CHECKS]
