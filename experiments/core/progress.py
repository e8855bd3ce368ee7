"""Progress of long work: bars on a terminal, and in a log file one line now and then with an estimate."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as RemainingColumn

ProgressCallback = Callable[[str, int, int], None]
"""Called as (phase, done, total) whenever some work advances, where done and total count the phase's steps."""

INTERVAL = 30.0
"""Seconds between two lines about the same task in a log."""


def ignore_progress(phase: str, done: int, total: int) -> None:
    """A `ProgressCallback` that does nothing."""


class ProgressDisplay(ABC):
    """Shows tasks that advance. `update` is itself a `ProgressCallback` that makes one task of every phase."""

    @abstractmethod
    def update(self, task: str, done: int, total: int, description: str | None = None) -> None:
        """Show how far a task is; its first update creates it.

        Args:
            task: identifies it.
            done: steps done.
            total: steps in all.
            description: the text to show; None: the task's name.
        """

    @abstractmethod
    def remove(self, task: str) -> None:
        """Stop showing a task, if it is shown."""

    @abstractmethod
    def speed(self, task: str) -> float | None:
        """Steps a second of a task lately, or None if that is not known yet."""

    def callback(self, task: str) -> ProgressCallback:
        """Return a callback that shows all phases as one task, which is described by the present phase."""
        return lambda phase, done, total: self.update(task, done, total, phase)


@contextmanager
def show_progress(console: Console) -> Iterator[ProgressDisplay]:
    """Show progress on a console: bars if it is a terminal, otherwise lines."""
    if not console.is_terminal:
        yield ProgressLines(console)
        return
    columns = (
        TextColumn("{task.description:<48}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, TextColumn("left"), RemainingColumn(), console=console) as bars:
        yield ProgressBars(bars)


class ProgressBars(ProgressDisplay):
    """Bars with counts, the time spent and the time left."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def update(self, task: str, done: int, total: int, description: str | None = None) -> None:
        """See `ProgressDisplay.update`."""
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task(description or task, total=total)
        self._bars.update(self._tasks[task], completed=done, total=total, description=description or task)

    def remove(self, task: str) -> None:
        """See `ProgressDisplay.remove`."""
        if task in self._tasks:
            self._bars.remove_task(self._tasks.pop(task))

    def speed(self, task: str) -> float | None:
        """See `ProgressDisplay.speed`."""
        number = self._tasks.get(task)
        return next((row.speed for row in self._bars.tasks if row.id == number), None)


@dataclass
class _LoggedTask:
    """A task as lines show it: where and when its counting began, and what the last line said."""

    start: float
    first: int
    printed: float
    total: int
    complete: bool = False
    done: int = 0
    latest: float = 0.0


class ProgressLines(ProgressDisplay):
    """A line when a task begins, every `interval` seconds while it runs, and when it is complete.

    Args:
        console: where lines are printed.
        interval: seconds between two lines about the same task.
        clock: seconds now, from any start.
    """

    def __init__(
        self, console: Console, interval: float = INTERVAL, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._interval = interval
        self._clock = clock
        self._tasks: dict[str, _LoggedTask] = {}

    def update(self, task: str, done: int, total: int, description: str | None = None) -> None:
        """See `ProgressDisplay.update`."""
        now = self._clock()
        row = self._tasks.get(task)
        is_new = row is None
        if row is None:
            row = self._tasks[task] = _LoggedTask(now, done, now, total)
        elif done < row.done or total != row.total:  # another phase counts something else
            row.start = now
            row.first = done
            row.total = total
            row.complete = False
        row.done = done
        row.latest = now
        completes = done >= total > 0 and not row.complete
        if is_new or completes or now - row.printed >= self._interval:
            row.printed = now
            row.complete = done >= total > 0
            self._print(description or task, row)

    def remove(self, task: str) -> None:
        """See `ProgressDisplay.remove`."""
        self._tasks.pop(task, None)

    def speed(self, task: str) -> float | None:
        """See `ProgressDisplay.speed`."""
        row = self._tasks.get(task)
        if row is None or row.done <= row.first or row.latest <= row.start:
            return None
        return (row.done - row.first) / (row.latest - row.start)

    def _print(self, description: str, row: _LoggedTask) -> None:
        text = f"{description}: {row.done}/{row.total}"
        elapsed = row.latest - row.start
        if row.complete:
            text += f", took {_duration(elapsed)}"
        elif row.done > row.first and elapsed > 0:
            left = elapsed * (row.total - row.done) / (row.done - row.first)
            text += f", {_duration(elapsed)} elapsed, about {_duration(left)} left"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
