"""A benchmark as data: contenders x sizes -> times in turns, memory, ratios to each other and to a floor.

contest (contenders, ladder, floor)  ->  run  ->  Record  ->  JSON, table, plot

A contender that cannot run is recorded with its reason, and the others go on; one that has become slow stops climbing.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from experiments.core.memory import measure_peak_bytes
from experiments.core.timing import Quartiles, time_interleaved

Make = Callable[[int], Callable[[], object]]
"""Number of tokens (or the like) -> what is timed; raises where it cannot."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """The least that a computation has to do: bytes to move, and operations (multiply-adds x 2)."""

    moved: int
    flops: int

    def seconds(self, rates: Rates) -> float:
        """The floor: whichever of the two takes longer at the machine's measured rates."""
        return max(self.moved / rates.bandwidth, self.flops / rates.flops)


@dataclass(frozen=True)
class Rates:
    """What the machine does, measured in the same run: bytes read and written a second, operations a second."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Contest:
    """What is compared.

    Attributes:
        name: of the comparison.
        contenders: name -> maker; the first that is no baseline is what ratios are of.
        sizes: the ladder, rising.
        baselines: names of the contenders that are not this library's.
        axis: what a size counts.
        floor: size -> the least work, or None where nobody would agree on one.
        growth: whether the question is how times grow: those that have become slow climb on, freed memory stays with
            the process, so that no contender waits for the system's pages, and no peak is measured.
    """

    name: str
    contenders: Mapping[str, Make]
    sizes: Sequence[int]
    baselines: frozenset[str] = frozenset()
    axis: str = "tokens"
    floor: Callable[[int], Work] | None = None
    growth: bool = False


@dataclass(frozen=True)
class Row:
    """One contender at one size; `error` says why there is no time."""

    contest: str
    contender: str
    size: int
    time: Quartiles | None = None
    peak: int | None = None
    floor: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def over_floor(self) -> float | None:
        """Time over the floor: 1 is as fast as the machine can."""
        return self.time.median / self.floor if self.time and self.floor else None


@dataclass(frozen=True)
class Limits:
    """How long a benchmark may take: turns, seconds after which a contender climbs no further, seconds in all."""

    repeats: int = 7
    slow: float = 2.0
    budget: float = math.inf


def run_contest(
    contest: Contest, rates: Rates | None, limits: Limits, device: str = "cpu", report: Report | None = None
) -> list[Row]:
    """Climb the ladder with all contenders, timed in turns; returns a row for each at every size it reached."""
    rows: list[Row] = []
    running, start = list(contest.contenders), time.perf_counter()
    for size in contest.sizes:
        if not running or time.perf_counter() - start > limits.budget:
            break
        if report is not None:
            report(f"{contest.name}: {size:,} {contest.axis}")
        runs, peaks = {}, {}
        for name in list(running):
            try:
                call = contest.contenders[name](size)
                call()  # what a first call compiles or allocates is not what is measured
                runs[name], peaks[name] = call, None if contest.growth else measure_peak_bytes(call, device)
            except Exception as error:  # whatever a contender raises, the others go on
                running.remove(name)
                rows.append(Row(contest.name, name, size, error=told(error)))
        times = _timed(contest, runs, limits, device, size, rows)
        running = [name for name in running if name in times]
        floor = contest.floor(size).seconds(rates) if contest.floor and rates else None
        rows += [_row(contest, name, size, times, peaks[name], floor) for name in times]
        running = [n for n in running if contest.growth or statistics.median(times[n]) < limits.slow]
        del runs
        gc.collect()
    return rows


def _timed(
    contest: Contest, runs: dict[str, Callable[[], object]], limits: Limits, device: str, size: int, rows: list[Row]
) -> dict[str, list[float]]:
    """Seconds by contender; one that fails in its turn is recorded, and the rest are timed again."""
    while runs:
        failed: list[tuple[str, Exception]] = []

        def guarded(name: str, call: Callable[[], object]) -> None:
            try:
                call()
            except Exception as error:
                failed.append((name, error))  # noqa: B023
                raise

        turns = {name: partial(guarded, name, call) for name, call in runs.items()}
        try:
            return time_interleaved(turns, limits.repeats, warmup=1, max_seconds=5 * len(runs), device=device)
        except Exception:
            (name, error), *_ = failed
            del runs[name]
            rows.append(Row(contest.name, name, size, error=told(error)))
    return {}


def _row(
    contest: Contest, name: str, size: int, times: dict[str, list[float]], peak: int | None, floor: float | None
) -> Row:
    ratios = {
        other: statistics.median(a / b for a, b in zip(times[other], times[name], strict=True))
        for other in times
        if other in contest.baselines and other != name
    }
    return Row(contest.name, name, size, Quartiles.from_times(times[name]), peak, floor, ratios)


def told(error: Exception) -> str:
    """An error as one line."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"


def growth(points: Sequence[tuple[int, float]]) -> float | None:
    """The exponent p of time ~ size^p: the least-squares slope in log-log axes; None for fewer than two points."""
    if len(points) < 2:
        return None
    xs, ys = ([math.log(v) for v in axis] for axis in zip(*points, strict=True))
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def exponents(rows: Sequence[Row], smallest: int = 4096) -> dict[tuple[str, str], float]:
    """(contest, contender) -> growth exponent over the sizes from `smallest` on, where there are two or more."""
    found = {}
    for key in dict.fromkeys((row.contest, row.contender) for row in rows):
        points = [
            (row.size, row.time.median)
            for row in rows
            if (row.contest, row.contender) == key and row.time and row.size >= smallest
        ]
        exponent = growth(points)
        if exponent is not None:
            found[key] = exponent
    return found


def measure_rates(device: str, dtype: torch.dtype, repeats: int = 5) -> Rates:
    """Copy bandwidth and matrix rate of the machine at hand: the best of some repeats, on tensors beyond any cache."""
    gpu = device.startswith("cuda")
    source = torch.randn((1 << 28) if gpu else (1 << 24), device=device)
    target, side = torch.empty_like(source), 8192 if gpu else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    runs = {"copy": lambda: target.copy_(source), "matrix": lambda: a @ b}
    times = time_interleaved(runs, repeats, device=device)
    return Rates(2 * source.numel() * source.element_size() / min(times["copy"]), 2 * side**3 / min(times["matrix"]))


def as_json(rows: Sequence[Row], rates: Rates | None, machine: Mapping[str, Any], command: str) -> dict[str, Any]:
    """All that was measured, as plain values."""
    return {
        "command": command,
        "machine": dict(machine),
        "rates": None if rates is None else asdict(rates),
        "exponents": [{"contest": c, "contender": n, "exponent": p} for (c, n), p in exponents(rows).items()],
        "rows": [{**asdict(row), "over_floor": row.over_floor} for row in rows],
    }
