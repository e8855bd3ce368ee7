"""A benchmark: implementations of one computation, timed in alternation at increasing sizes.

An implementation that cannot run is recorded with the reason, and the others go on. One whose call has become slow is
not measured at larger sizes, and nothing is started that the time budget does not allow.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial

from experiments.bench.roofline import Roofline, Workload
from experiments.core.memory import measure_peak_bytes
from experiments.core.timing import Clock, Quartiles, time_interleaved

BuildCall = Callable[[int], Callable[[], object]]
"""Takes a size, such as a number of tokens, and returns the call to time; raises if it cannot run at that size."""

OUT_OF_BUDGET = "not measured: the time budget is spent"
MIN_TURN_SECONDS = 0.01
"""A shorter call is repeated within a turn until this time is filled."""


@dataclass(frozen=True)
class Benchmark:
    """A computation and the implementations that are compared.

    Attributes:
        name: of the computation.
        implementations: how to build each implementation's call, by name.
        sizes: the sizes to measure at, in increasing order.
        baselines: names of the implementations that the others are compared with.
        size_unit: what a size counts.
        workload: the least work at a size; None where no such bound is agreed on.
        measures_growth: whether the question is how time grows with size. Then slow implementations are measured at
            every size, and peak memory is not measured.
    """

    name: str
    implementations: Mapping[str, BuildCall]
    sizes: Sequence[int]
    baselines: frozenset[str] = frozenset()
    size_unit: str = "tokens"
    workload: Callable[[int], Workload] | None = None
    measures_growth: bool = False


@dataclass(frozen=True)
class Measurement:
    """One implementation at one size.

    Attributes:
        benchmark: name of the benchmark.
        implementation: name of the implementation.
        size: in the benchmark's unit.
        time: seconds per call; None if there is an `error`.
        turns: number of turns that `time` summarizes.
        peak_bytes: memory needed above what is in use before the call; None if not measured.
        roofline_seconds: the least time that the machine needs; None if the benchmark has no workload.
        speedups: baseline -> its time divided by this implementation's, the median over turns.
        error: why there is no time.
    """

    benchmark: str
    implementation: str
    size: int
    time: Quartiles | None = None
    turns: int = 0
    peak_bytes: int | None = None
    roofline_seconds: float | None = None
    speedups: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def times_roofline(self) -> float | None:
        """Median time divided by the roofline's: 1 is as fast as the machine can be."""
        return self.time.median / self.roofline_seconds if self.time and self.roofline_seconds else None


@dataclass(frozen=True)
class BenchmarkLimits:
    """How long a benchmark may take.

    Attributes:
        repeats: number of turns that times are taken over.
        slow_seconds: an implementation whose call takes at least this long is not measured at larger sizes.
        budget_seconds: the time for one benchmark. The first calls at a size may exceed it, because on a GPU they
            compile kernels.
        deadline: a time on the clock; nothing is built or called after it, and no call is started that is expected to
            end later.
    """

    repeats: int = 7
    slow_seconds: float = 2.0
    budget_seconds: float = math.inf
    deadline: float = math.inf


def run_benchmark(
    benchmark: Benchmark,
    roofline: Roofline | None,
    limits: BenchmarkLimits,
    device: str = "cpu",
    on_size: Callable[[int], None] | None = None,
    on_measurements: Callable[[list[Measurement]], None] | None = None,
    clock: Clock = time.perf_counter,
) -> list[Measurement]:
    """Measure all implementations of a benchmark at increasing sizes.

    Args:
        benchmark: what to measure.
        roofline: limits of the machine; None leaves the roofline out.
        limits: how long it may take.
        device: "cpu" or "cuda", optionally with an index.
        on_size: called with a size before it is measured.
        on_measurements: called with the new measurements after each size.
        clock: source of the time, in seconds.

    Returns:
        A measurement of every implementation at every size that it reached; where it failed or the budget ended, one
        with the reason.
    """
    run = _Run(benchmark, roofline, limits, device, clock)
    measurements: list[Measurement] = []
    for size in benchmark.sizes:
        if not run.running:
            break
        if on_size is not None:
            on_size(size)
        added = run.measure(size)
        measurements += added
        if on_measurements is not None:
            on_measurements(added)
        gc.collect()  # cycles may hold this size's tensors
    return measurements


def format_error(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"


class _Run:
    """The state of a running benchmark: the implementations that are still measured, and the times so far."""

    def __init__(
        self, benchmark: Benchmark, roofline: Roofline | None, limits: BenchmarkLimits, device: str, clock: Clock
    ) -> None:
        self.benchmark = benchmark
        self.roofline = roofline
        self.limits = limits
        self.device = device
        self.clock = clock
        self.budget_end = clock() + limits.budget_seconds
        self.running = list(benchmark.implementations)
        self.medians: dict[str, list[tuple[int, float]]] = {name: [] for name in self.running}

    def measure(self, size: int) -> list[Measurement]:
        """Measure at one size; implementations that fail, are slow or exceed the budget leave `running`."""
        measurements: list[Measurement] = []
        calls: dict[str, Callable[[], object]] = {}
        durations: dict[str, float] = {}
        peaks: dict[str, int | None] = {}
        for name in list(self.running):
            try:
                calls[name], durations[name], peaks[name] = self._prepare(name, size)
            except _OutOfBudget:
                measurements.append(self._failure(name, size, OUT_OF_BUDGET))
            except Exception as error:  # whatever an implementation raises, the others go on
                measurements.append(self._failure(name, size, format_error(error)))
        times = self._time(calls, durations, size, measurements)
        for name in times:
            measurements.append(self._measurement(name, size, times, peaks[name]))
            self.medians[name].append((size, statistics.median(times[name])))
        self.running = [name for name in self.running if name in times and self._may_grow(name)]
        return measurements

    def _prepare(self, name: str, size: int) -> tuple[Callable[[], object], float, int | None]:
        """Build an implementation's call and run it twice; returns it with its duration and peak memory.

        The first call may compile and allocate; the second one is measured.
        """
        expected = _expected_seconds(self.medians[name], size)
        self._require(4 * expected, self.budget_end)  # two calls here, a warm-up and one turn
        call = self.benchmark.implementations[name](size)
        self._require(expected, self.limits.deadline)  # building took time as well
        start = self.clock()
        call()
        first_seconds = self.clock() - start
        self._require(first_seconds, self.limits.deadline)
        if not self.device.startswith("cuda"):  # nothing was compiled: the other calls take as long
            self._require(3 * first_seconds, self.budget_end)
        start = self.clock()
        peak = None
        if self.benchmark.measures_growth:
            call()
        else:
            peak = measure_peak_bytes(call, self.device)
        return call, self.clock() - start, peak

    def _require(self, seconds: float, end: float) -> None:
        if self.clock() + seconds > min(end, self.limits.deadline):
            raise _OutOfBudget

    def _time(
        self,
        calls: dict[str, Callable[[], object]],
        durations: dict[str, float],
        size: int,
        measurements: list[Measurement],
    ) -> dict[str, list[float]]:
        """Time the calls in alternation; one that fails is recorded, and the others are timed again.

        If the time does not suffice for a warm-up and one turn of all, the slowest is left out. Compilation may have
        used up the budget, so at least half of it is available here.
        """
        while calls:
            end = max(self.budget_end, self.clock() + self.limits.budget_seconds / 2)
            available = min(end, self.limits.deadline) - self.clock()
            turn_seconds = sum(_turn_seconds(durations[name]) for name in calls)
            if 2 * turn_seconds > available:
                slowest = max(calls, key=lambda name: durations[name])
                measurements.append(self._failure(slowest, size, OUT_OF_BUDGET))
                del calls[slowest]
                continue
            failures: list[tuple[str, Exception]] = []
            try:
                return time_interleaved(
                    {name: partial(_run_guarded, name, call, failures) for name, call in calls.items()},
                    self.limits.repeats,
                    warmup=1,
                    min_seconds=MIN_TURN_SECONDS,
                    max_seconds=min(5 * len(calls), available - 2 * turn_seconds),
                    min_turns=3 if 4 * turn_seconds <= available else 1,
                    device=self.device,
                    clock=self.clock,
                )
            except Exception:
                name, error = failures[0]
                measurements.append(self._failure(name, size, format_error(error)))
                del calls[name]
        return {}

    def _may_grow(self, name: str) -> bool:
        _, median = self.medians[name][-1]
        return self.benchmark.measures_growth or median < self.limits.slow_seconds

    def _failure(self, name: str, size: int, reason: str) -> Measurement:
        return Measurement(self.benchmark.name, name, size, error=reason)

    def _measurement(self, name: str, size: int, times: dict[str, list[float]], peak: int | None) -> Measurement:
        speedups = {
            other: statistics.median(theirs / ours for theirs, ours in zip(times[other], times[name], strict=True))
            for other in times
            if other in self.benchmark.baselines and other != name
        }
        workload = self.benchmark.workload
        return Measurement(
            self.benchmark.name,
            name,
            size,
            time=Quartiles.from_times(times[name]),
            turns=len(times[name]),
            peak_bytes=peak,
            roofline_seconds=self.roofline.seconds(workload(size)) if workload and self.roofline else None,
            speedups=speedups,
        )


class _OutOfBudget(Exception):
    """The time budget does not allow the next call."""


def _run_guarded(name: str, call: Callable[[], object], failures: list[tuple[str, Exception]]) -> None:
    """Run a call; if it raises, note which implementation it was before the error goes on."""
    try:
        call()
    except Exception as error:
        failures.append((name, error))
        raise


def _turn_seconds(call_seconds: float) -> float:
    """Return the most that one turn takes."""
    return call_seconds if call_seconds >= MIN_TURN_SECONDS else MIN_TURN_SECONDS + call_seconds


def _expected_seconds(medians: Sequence[tuple[int, float]], size: int) -> float:
    """Extrapolate the time of a call from smaller sizes; 0 without any.

    The exponent is that of the last two sizes, between 1 and 2; with one size, 2.
    """
    if not medians:
        return 0.0
    exponent = 2.0
    last_size, last_seconds = medians[-1]
    if len(medians) > 1:
        previous_size, previous_seconds = medians[-2]
        slope = math.log(last_seconds / previous_seconds) / math.log(last_size / previous_size)
        exponent = min(max(slope, 1.0), 2.0)
    return last_seconds * (size / last_size) ** exponent


def select_baselines(benchmarks: Iterable[Benchmark], pattern: str) -> list[Benchmark]:
    """Return the benchmarks with only those baselines whose name matches a wildcard pattern."""
    selected = []
    for benchmark in benchmarks:
        implementations = {
            name: build
            for name, build in benchmark.implementations.items()
            if name not in benchmark.baselines or fnmatchcase(name, pattern)
        }
        selected.append(replace(benchmark, implementations=implementations))
    return selected
