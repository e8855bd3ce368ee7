"""Benchmarks of the three operators in all their modes, against published formulas and other libraries' kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from experiments.bench import baselines
from experiments.bench.benchmark import Benchmark, BuildCall
from experiments.bench.calls import PASSES, Wrapper
from experiments.bench.config import BenchmarkConfig
from experiments.bench.inputs import InputFactory, attention_inputs, delta_inputs, linear_inputs, scan_inputs
from experiments.bench.roofline import Workload
from mixers import operators

CHUNKED = "chunked"
RECURRENT = "recurrent"


@dataclass(frozen=True)
class OperatorMode:
    """One mode of an operator, such as causal linear attention with a scalar decay.

    Attributes:
        name: of the benchmark, without heads and pass.
        function: the operator in this mode; it takes the inputs and `backend`.
        inputs: makes its inputs.
        others: other implementations of the same mode, as functions of the same inputs, by name.
        has_workload: whether a roofline is given.
    """

    name: str
    function: Callable[..., Any]
    inputs: InputFactory
    others: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    has_workload: bool = True


def operator_modes() -> Iterator[OperatorMode]:
    """Yield every mode that is benchmarked, beginning with the one that large images use."""
    linear: Any = operators.linear_attention
    positive = partial(linear, feature_map="elu_plus_one")
    others = {"published formula": baselines.published_linfusion, "SDPA": baselines.softmax_attention}
    yield OperatorMode("non-causal, normalized", positive, attention_inputs, others)
    yield OperatorMode("non-causal", partial(positive, normalize=False), attention_inputs)
    for decay in ("none", "scalar", "vector"):
        inputs = partial(linear_inputs, decay)
        name = f"causal, decay {decay}"
        yield OperatorMode(f"{name}, normalized", partial(positive, causality="causal", normalize=True), inputs)
        causal = partial(linear, causality="causal", normalize=False)
        yield OperatorMode(name, causal, inputs, {"fla itself": baselines.fla_causal})
        if decay != "none":
            bidirectional = partial(positive, causality="bidirectional")
            yield OperatorMode(f"bidirectional, decay {decay}, normalized", bidirectional, inputs)
    yield OperatorMode("selective scan", operators.selective_scan, scan_inputs, has_workload=False)
    delta: Any = operators.delta_rule
    yield OperatorMode("delta rule", delta, partial(delta_inputs, "scalar"))
    yield OperatorMode("delta rule, decay vector", delta, partial(delta_inputs, "vector"))
    yield OperatorMode("delta rule, non-causal", partial(delta, causality="noncausal"), partial(delta_inputs, "scalar"))


def operator_benchmarks(config: BenchmarkConfig) -> Iterator[Benchmark]:
    """Yield a benchmark for all heads, modes and passes: every backend that runs here, and other implementations."""
    for heads, width in config.heads:
        for mode in operator_modes():
            for pass_name, wrap in PASSES.items():
                if config.backward or pass_name == "forward":
                    yield _benchmark(config, mode, heads, width, pass_name, wrap)


def _benchmark(
    config: BenchmarkConfig, mode: OperatorMode, heads: int, width: int, pass_name: str, wrap: Wrapper
) -> Benchmark:
    def build(function: Callable[..., Any], max_tokens: int | None = None) -> BuildCall:
        def build_call(length: int) -> Callable[[], object]:
            if max_tokens is not None and length > max_tokens:
                raise ValueError(f"not measured beyond {max_tokens:,} tokens, because it loops over tokens")
            torch.manual_seed(length)  # every implementation gets the same numbers
            return wrap(function, *mode.inputs(config, length, heads, width))

        return build_call

    backends = (CHUNKED, *config.available_kernels())
    implementations = {name: build(partial(mode.function, backend=name)) for name in backends}
    implementations[RECURRENT] = build(partial(mode.function, backend=RECURRENT), config.max_recurrent_tokens)
    implementations |= {name: build(function) for name, function in mode.others.items()}
    backward = pass_name != "forward"
    return Benchmark(
        name=f"{mode.name}, b{config.batch} h{heads} k{width}: {pass_name}",
        implementations=implementations,
        sizes=config.lengths,
        baselines=frozenset({*mode.others, RECURRENT}),
        workload=partial(least_work, config, mode.inputs, heads, width, backward) if mode.has_workload else None,
    )


def least_work(
    config: BenchmarkConfig, inputs: InputFactory, heads: int, width: int, backward: bool, length: int
) -> Workload:
    """Return the least work of an attention-like operator.

    Every input is read and the result written once; the backward pass reads them and the result's gradient, and writes
    the inputs' gradients. The products are of keys with values and of queries with the state; the backward pass has
    twice as many. What a causal order adds is not counted.
    """
    tensors = [t for t in inputs(replace(config, device="meta"), length, heads, width) if t is not None]
    input_bytes = sum(t.numel() * t.element_size() for t in tensors)
    result = config.batch * length * heads * width
    result_bytes = result * torch.empty(0, dtype=config.dtype).element_size()
    bytes_moved = input_bytes + result_bytes
    products = 2
    if backward:
        bytes_moved += 2 * input_bytes + result_bytes
        products += 4
    return Workload(bytes_moved, products * 2 * result * width)
