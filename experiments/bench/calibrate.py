"""Measure which backend is the fastest for every kind of call, and write the table that `backend="auto"` follows."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.bench.calls import forward_call
from experiments.bench.config import BenchmarkConfig
from experiments.bench.inputs import InputFactory, delta_inputs, linear_inputs, scan_inputs
from experiments.core.progress import ProgressCallback, ignore_progress
from experiments.core.timing import Clock, time_interleaved
from mixers import operators
from mixers.operators.backend import FORMULATIONS, LAST_RESORT
from mixers.operators.backend_table import (
    TABLE_VARIABLE,
    BackendPreference,
    default_path,
    device_name,
    load_table,
    save_table,
)

RECURRENT = "recurrent"  # never the fastest
DENSE = "dense"
MAX_DENSE_TOKENS = 1024
LENGTHS = (16, 64, 256, 1024, 4096, 16384)
REQUIRED_SHARE = 0.9
"""A backend is preferred over the last resort if it takes less than this share of its time, so not by chance."""


@dataclass(frozen=True)
class CallKind:
    """A kind of operator call that the table has a row for.

    Attributes:
        operator: "linear", "scan" or "delta".
        causality: of the call.
        decay: "none", "scalar" or "vector".
        function: the operator in that mode; it takes the inputs and `backend`.
        inputs: makes its inputs.
    """

    operator: str
    causality: str
    decay: str
    function: Callable[..., Any]
    inputs: InputFactory


def calibrate_backends(
    config: BenchmarkConfig,
    path: Path | None = None,
    lengths: Sequence[int] = LENGTHS,
    budget_seconds: float = math.inf,
    progress: ProgressCallback = ignore_progress,
    clock: Clock = time.perf_counter,
) -> tuple[Path, list[BackendPreference]]:
    """Time every backend that can run here on every kind of call, and write the table.

    Args:
        config: device, dtype and batch size; the first of its heads is measured.
        path: of the table; None: where `backend="auto"` looks.
        lengths: numbers of tokens.
        budget_seconds: nothing is started after this time. Kinds of calls that are not measured at all lengths by then
            get no row, so that `backend="auto"` runs the chunked formulation for them.
        progress: called with every kind of call.
        clock: source of the time, in seconds.

    Returns:
        The path of the table and its rows.

    Raises:
        ValueError: the file is no table of backends.
        OSError: it cannot be written.

    Cost: a minute or two on a CPU.
    """
    heads, width = config.heads[0]
    kinds = list(call_kinds())
    target = path or Path(os.environ.get(TABLE_VARIABLE) or default_path())
    name = device_name(torch.device(config.device))
    existing = load_table(target if target.is_file() else None)
    save_table(target, name, existing.get(name, ()))  # fails before the work if the file cannot be written
    deadline = clock() + budget_seconds
    rows = []
    for number, kind in enumerate(kinds):
        progress(f"{kind.operator}, {kind.causality}, decay {kind.decay}", number, len(kinds))
        times: dict[int, dict[str, float]] = {}
        for length in lengths:
            if clock() < deadline:
                times[length] = time_backends(config, kind, length, heads, width, deadline - clock())
        if len(times) < len(lengths):
            break
        rows.append(BackendPreference(kind.operator, kind.causality, kind.decay, tuple(order_backends(times))))
    progress("measured", len(rows), len(kinds))
    save_table(target, name, rows)
    return target, rows


def order_backends(times: Mapping[int, Mapping[str, float]]) -> list[tuple[str, int | None]]:
    """Turn measured times into the order in which backends are tried.

    The fastest backend wins at each length; adjacent lengths with the same winner are joined. The last resort, which
    runs everywhere, gives way only to a backend that takes less than `REQUIRED_SHARE` of its time.

    Args:
        times: number of tokens -> seconds per call, by backend.

    Returns:
        (backend, largest number of tokens that it is used for; None: no bound). Between two lengths with different
        winners the bound is their geometric mean.
    """
    order: list[tuple[str, int | None]] = []
    lengths = sorted(times)
    for length, next_length in zip(lengths, [*lengths[1:], None], strict=True):
        if not times[length]:
            continue
        winner = _fastest(times[length])
        bound = None if next_length is None else round(math.sqrt(length * next_length))
        if order and order[-1][0] == winner:
            order.pop()
        order.append((winner, bound))
    if order and order[-1][0] == DENSE:  # quadratic: it is not used beyond what was measured
        return [*order[:-1], (DENSE, lengths[-1]), (LAST_RESORT, None)]
    if order:
        order[-1] = (order[-1][0], None)
    return order


def _fastest(times: Mapping[str, float]) -> str:
    return min(times, key=lambda name: times[name] * (REQUIRED_SHARE if name == LAST_RESORT else 1))


def time_backends(
    config: BenchmarkConfig, kind: CallKind, length: int, heads: int, width: int, max_seconds: float = math.inf
) -> dict[str, float]:
    """Return median seconds of a forward pass of every backend that can run it; dense up to `MAX_DENSE_TOKENS`.

    After `max_seconds` no turn starts, unless fewer than three are complete.
    """
    inputs = kind.inputs(config, length, heads, width)
    runs: dict[str, Callable[[], object]] = {}
    for name in (*FORMULATIONS, *config.available_kernels()):
        if name == RECURRENT or (name == DENSE and length > MAX_DENSE_TOKENS):
            continue
        run = forward_call(partial(kind.function, backend=name), *inputs)
        try:
            run()
        except Exception:  # it cannot compute this call, so it is not in the table
            continue
        runs[name] = run
    times = time_interleaved(runs, 5, device=config.device, min_seconds=0.002, max_seconds=max_seconds)
    return {name: statistics.median(turns) for name, turns in times.items()}


def call_kinds() -> Iterator[CallKind]:
    """Yield every kind of call that the table has a row for."""
    linear: Any = operators.linear_attention
    scan: Any = operators.selective_scan
    delta: Any = operators.delta_rule
    for causality in ("noncausal", "causal", "bidirectional"):
        for decay in ("none", "scalar", "vector"):
            function = partial(linear, causality=causality, feature_map="elu_plus_one")
            yield CallKind("linear", causality, decay, function, partial(linear_inputs, decay))
        yield CallKind("scan", causality, "vector", partial(scan, causality=causality), scan_inputs)
        for decay in ("scalar", "vector"):
            yield CallKind("delta", causality, decay, partial(delta, causality=causality), partial(delta_inputs, decay))
