"""Measure which backend is the fastest, call by call, and write the table that `auto` goes by on this machine."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.bench import baselines
from experiments.bench.contest import Report
from experiments.bench.contests import Setup, gated, states, written
from experiments.core.timing import time_interleaved
from mixers import operators
from mixers.operators.choice import FORMULATIONS, LAST_RESORT
from mixers.operators.preference import VARIABLE, Row, default_path, device_name, save_table

RECURRENT = "recurrent"  # never the fastest; a truth for tests
LADDER = (16, 64, 256, 1024, 4096, 16384)
LEAD = 0.9  # of the last resort's time: what is chosen over it is faster by more than chance

Timed = Mapping[int, Mapping[str, float]]
"""Number of tokens -> seconds of one call, by backend."""


def calibrate(
    setup: Setup, path: Path | None = None, ladder: Sequence[int] = LADDER, report: Report | None = None
) -> tuple[Path, list[Row]]:
    """Time every backend that can run here on every kind of call, and write the table; returns its path and rows.

    Args:
        setup: device, dtype, batch; the first of its heads is measured.
        path: None is where `auto` looks.
        ladder: numbers of tokens.

    Cost: a minute or two on a CPU.
    """
    heads, width = setup.heads[0]
    rows = []
    for operator, causality, decay, call in _kinds():
        if report is not None:
            report(f"{operator}, {causality}, decay {decay}")
        timed = {}
        for length in ladder:
            timed[length] = time_backends(setup, call, length, heads, width)
        rows.append(Row(operator, causality, decay, tuple(best(timed))))
    target = path or Path(os.environ.get(VARIABLE) or default_path())
    save_table(target, device_name(torch.device(setup.device)), rows)
    return target, rows


def best(timed: Timed) -> list[tuple[str, int | None]]:
    """(backend, up to how many tokens): the fastest at each length, those that win side by side joined.

    The last resort, which runs everywhere, gives way only to what takes less than LEAD of its time.

    Between two measured lengths with different winners the bound is their geometric mean; the last winner has none.
    """
    order: list[tuple[str, int | None]] = []
    lengths = sorted(timed)
    for length, following in zip(lengths, [*lengths[1:], None], strict=True):
        if not timed[length]:
            continue
        name = min(timed[length], key=lambda n: timed[length][n] * (LEAD if n == LAST_RESORT else 1))
        bound = None if following is None else round(math.sqrt(length * following))
        if order and order[-1][0] == name:
            order.pop()
        order.append((name, bound))
    if order and order[-1][0] == "dense":  # quadratic: not beyond what was measured
        return [*order[:-1], ("dense", lengths[-1]), (LAST_RESORT, None)]
    if order:
        order[-1] = (order[-1][0], None)
    return order


def time_backends(setup: Setup, call: Any, length: int, heads: int, width: int) -> dict[str, float]:
    """Median seconds of a forward pass by backend, of those that can run it; the dense form up to 1,024 tokens."""
    function, streams = call
    tensors = streams(setup, length, heads, width)
    runs: dict[str, Callable[[], object]] = {}
    for name in (*FORMULATIONS, *setup.kernels):
        if name == RECURRENT or (name == "dense" and length > 1024):
            continue
        run = baselines.forward(partial(function, backend=name), *tensors)
        try:
            run()
        except Exception:  # it cannot compute this: it is not in the table
            continue
        runs[name] = run
    times = time_interleaved(runs, 5, device=setup.device, min_seconds=0.002)
    return {name: statistics.median(of) for name, of in times.items()}


def _kinds() -> list[tuple[str, str, str, Any]]:
    """(operator, causality, decay, (function, its tensors)) of every row of the table."""
    elu: dict[str, Any] = {"feature_map": "elu_plus_one"}
    delta: Any = operators.delta_rule
    found: list[tuple[str, str, str, Any]] = []
    linear: Any = operators.linear_attention
    scan: Any = operators.selective_scan
    for causality in ("noncausal", "causal", "bidirectional"):
        for decay in ("none", "scalar", "vector"):
            function = partial(linear, causality=causality, **elu)
            found.append(("linear", causality, decay, (function, partial(gated, decay))))
        found.append(("scan", causality, "vector", (partial(scan, causality=causality), states)))
    for causality in ("causal", "bidirectional"):
        found.append(("delta", causality, "scalar", (partial(delta, causality=causality), written)))
    return found
