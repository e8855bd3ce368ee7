"""The benchmarks that `mixlab bench` runs by name, and how a suite of them is run within a time budget."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from rich.console import Console

from experiments.bench.benchmark import (
    OUT_OF_BUDGET,
    Benchmark,
    BenchmarkLimits,
    Measurement,
    run_benchmark,
    select_baselines,
)
from experiments.bench.config import BenchmarkConfig
from experiments.bench.machine import describe_machine, package_versions
from experiments.bench.model_benchmarks import (
    UNetBenchmarkConfig,
    growth_benchmarks,
    layer_benchmarks,
    unet_benchmarks,
)
from experiments.bench.operator_benchmarks import operator_benchmarks
from experiments.bench.plots import plot_times
from experiments.bench.roofline import measure_roofline
from experiments.bench.tables import BenchmarkConditions, plot_path, print_table, write_results
from experiments.core.memory import existing_objects_uncollected, keep_freed_memory
from experiments.core.progress import ProgressCallback, ignore_progress
from experiments.core.timing import Clock
from mixers.suggest import unknown_name

SUITES: dict[str, Callable[[BenchmarkConfig, UNetBenchmarkConfig], Iterator[Benchmark]]] = {
    "operators": lambda config, _: operator_benchmarks(config),
    "layers": lambda config, _: layer_benchmarks(config),
    "growth": lambda config, _: growth_benchmarks(config),
    "unet": unet_benchmarks,
    "memory": lambda config, _: operator_benchmarks(replace(config, lengths=config.lengths[-2:])),
}


def suite_benchmarks(
    suite: str, config: BenchmarkConfig, unet_config: UNetBenchmarkConfig, only: str = "*", against: str = "*"
) -> list[Benchmark]:
    """Return the benchmarks of a suite.

    Args:
        suite: one of `SUITES`.
        config: sizes, device and dtype.
        unet_config: of the suite "unet".
        only: wildcard pattern; benchmarks whose name does not match are left out.
        against: wildcard pattern; baselines whose name does not match are left out.

    Raises:
        ValueError: no such suite, profile or mixer, or no benchmark that matches `only`.
    """
    if suite not in SUITES:
        raise ValueError(unknown_name("benchmark", suite, (*SUITES, "crossover")))
    benchmarks = list(SUITES[suite](config, unet_config))
    selected = [benchmark for benchmark in benchmarks if fnmatchcase(benchmark.name, only)]
    if not selected:
        names = "; ".join(benchmark.name for benchmark in benchmarks)
        raise ValueError(f"No benchmark of {suite} matches {only!r}: expected one of {names}.")
    return select_baselines(selected, against)


def run_suite(
    suite: str,
    benchmarks: Iterable[Benchmark],
    config: BenchmarkConfig,
    limits: BenchmarkLimits,
    out: Path,
    console: Console,
    progress: ProgressCallback = ignore_progress,
    draw_plots: bool = True,
    clock: Clock = time.perf_counter,
) -> list[Measurement]:
    """Run benchmarks, print a table after each, and keep the results so far in a folder.

    The budget is shared: each benchmark may take an equal part of what is left. When it is spent nothing else is
    started: the remaining implementations get rows that say so, and one line lists their benchmarks. `<suite>.json` and
    `<suite>.md` are written after every size, so that an interrupted run loses nothing that was measured.

    Args:
        suite: names the files.
        benchmarks: what to measure.
        config: device and dtype.
        limits: `budget_seconds` is for all of it.
        out: the folder.
        console: receives the tables.
        progress: called with every size of every benchmark.
        draw_plots: whether to draw a plot per benchmark, which takes about half a second.
        clock: source of the time, in seconds.

    Returns:
        All measurements.
    """
    deadline = clock() + limits.budget_seconds
    benchmarks = list(benchmarks)
    unmeasured: list[str] = []
    machine = {**describe_machine(config.device), **package_versions()}
    machine["dtype"] = str(config.dtype).removeprefix("torch.")
    roofline = measure_roofline(config.device, config.dtype)
    conditions = BenchmarkConditions(shlex.join(["mixlab", *sys.argv[1:]]), machine, roofline, draw_plots)
    measurements: list[Measurement] = []

    def keep(added: list[Measurement]) -> None:
        measurements.extend(added)
        write_results(measurements, conditions, out, suite)

    with existing_objects_uncollected():
        for number, benchmark in enumerate(benchmarks):

            def report_size(size: int, number: int = number, benchmark: Benchmark = benchmark) -> None:
                progress(f"{benchmark.name}: {size:,} {benchmark.size_unit}", number, len(benchmarks))

            left = max(0.0, deadline - clock())
            share = replace(limits, budget_seconds=left / (len(benchmarks) - number), deadline=deadline)
            with keep_freed_memory() if benchmark.measures_growth else nullcontext():
                added = run_benchmark(benchmark, roofline, share, config.device, report_size, keep, clock)
            if all(m.error == OUT_OF_BUDGET for m in added):
                unmeasured.append(benchmark.name)
                continue
            if draw_plots and any(m.time is not None for m in added):
                plot_times(added, plot_path(out, suite, number))
            print_table(added, console)
    if unmeasured:
        line = f"{OUT_OF_BUDGET}: {len(unmeasured)} of {len(benchmarks)} benchmarks: {'; '.join(unmeasured)}"
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    progress(f"{suite}: measured", len(benchmarks), len(benchmarks))
    return measurements
