"""Timing that tolerates a busy machine: functions take turns, and short calls are repeated."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Clock = Callable[[], float]
"""Returns a time in seconds, like `time.perf_counter`."""


@dataclass(frozen=True)
class Quartiles:
    """The median and the lower and upper quartile of repeated measurements, in seconds per call."""

    median: float
    low: float
    high: float

    @classmethod
    def from_times(cls, times: Sequence[float]) -> Quartiles:
        """Summarize one measurement or more; the quartiles of a single one are its own value."""
        if len(times) == 1:
            return cls(times[0], times[0], times[0])
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        return cls(median, low, high)


def time_calls(
    run: Callable[[], object], calls: int = 1, device: str = "cpu", clock: Clock = time.perf_counter
) -> float:
    """Time `calls` consecutive calls and return the mean seconds of one; waits for a GPU to finish its work."""
    _synchronize(device)
    start = clock()
    for _ in range(calls):
        run()
    _synchronize(device)
    return (clock() - start) / calls


def time_interleaved(
    functions: Mapping[str, Callable[[], object]],
    repeats: int = 7,
    warmup: int = 2,
    *,
    min_seconds: float = 0.01,
    max_seconds: float = math.inf,
    min_turns: int = 3,
    device: str = "cpu",
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Time functions in alternation (A B A B), so that a disturbance of the machine affects all of them alike.

    Args:
        functions: the functions to call, by name.
        repeats: number of turns; every function is timed once per turn.
        warmup: untimed calls of each function before the first turn, at least one. The duration of the last one
            decides how often a short call is repeated within a turn.
        min_seconds: a function that takes less is called repeatedly within a turn until this time is filled.
        max_seconds: no turn starts after this many seconds, unless fewer than `min_turns` are complete.
        min_turns: turns that are completed whatever they take.
        device: for "cuda", the clock is read after the GPU has finished its work.
        clock: source of the time, in seconds.

    Returns:
        Seconds per call, one value per turn; values at the same index belong to the same turn.

    Raises:
        ValueError: `repeats` or `warmup` is less than 1.
    """
    if repeats < 1 or warmup < 1:
        raise ValueError(f"Cannot time calls with repeats={repeats} and warmup={warmup}: expected at least 1 of each.")
    calls = {}
    for name, run in functions.items():
        warmup_seconds = [time_calls(run, 1, device, clock) for _ in range(warmup)]
        calls[name] = max(1, math.ceil(min_seconds / max(warmup_seconds[-1], 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    start = clock()
    for turn in range(repeats):
        if turn >= min_turns and clock() - start > max_seconds:
            break
        for name, run in functions.items():
            times[name].append(time_calls(run, calls[name], device, clock))
    return times


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
