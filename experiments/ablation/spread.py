"""How the cells of a run are spread: one after another here, or over processes; `on_ray` has a cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from experiments.ablation import store
from experiments.ablation.cell import run_cell, setting_of
from experiments.config import CellConfig
from experiments.core.files import write_json
from experiments.core.locks import try_lock
from experiments.core.plugins import load_plugin
from experiments.core.progress import ProgressCallback

Record = dict[str, Any]
Tell = Callable[[CellConfig, str, int, int], None]
TRIES = 2
RUST = "pyo3_runtime"  # the module of panics of libraries in Rust, which are no exceptions


@dataclass(frozen=True)
class Work:
    """What a run has to do, as every process of it needs to know.

    Attributes:
        directory: the run's.
        since: when the run began, in seconds of the epoch; cells that failed before are tried again.
        plugins: files that register mixers.
    """

    directory: Path
    since: float
    plugins: tuple[Path, ...] = ()

    def folder(self, cell: CellConfig) -> Path:
        """The cell's own."""
        return self.directory / "cells" / cell.id


Spread = Callable[[Sequence[CellConfig], Work, Tell], Iterator[Record | None]]


class Died(RuntimeError):
    """A process came to its end over a cell."""


def attempt(cell: CellConfig, work: Work, tell: ProgressCallback) -> Record | None:
    """Do a cell unless another process has it or has done it; whatever is wrong with the cell is in its record.

    Returns:
        The record, or None where there was nothing to do here.
    """
    folder = work.folder(cell)
    with try_lock(folder) as ours:
        if not ours or store.settled(folder, work.since):
            return None
        try:
            with store.noted(folder, tell) as note:
                note("load", 0, 1)
                return run_cell(cell, setting_of(cell), folder, note)
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__module__ != RUST:
                raise
            return record_failure(cell, folder, error)


def record_failure(cell: CellConfig, folder: Path, error: BaseException) -> Record:
    """Write the record of a cell that failed."""
    record = store.failure(cell.id, cell.variant.name, cell.seed, error)
    write_json(folder / store.RESULT, record)
    return record


def in_turn(cells: Sequence[CellConfig], work: Work, tell: Tell) -> Iterator[Record | None]:
    """One cell after another, in this process."""
    for cell in cells:
        yield attempt(cell, work, partial(tell, cell))


def in_processes(cells: Sequence[CellConfig], work: Work, tell: Tell, count: int) -> Iterator[Record | None]:
    """`count` cells at a time, each in a process with its share of the cores, and of the GPUs where there are several.

    A cell whose process dies is tried again, once, from its last checkpoint, in a new process.
    """
    waiting, tries = deque(cells), Counter[str]()
    count = min(count, len(cells))
    workers = [_Worker(work, number, count) for number in range(count)]
    try:
        for worker in workers:
            worker.begin(waiting.popleft())
        while busy := [worker for worker in workers if worker.cell]:
            ready = wait([worker.pipe for worker in busy])
            for worker in (w for w in busy if w.pipe in ready):
                cell = worker.cell
                assert cell is not None
                try:
                    kind, message = worker.pipe.recv()
                except (EOFError, OSError):
                    tries[cell.id] += 1
                    died = worker.replace()
                    if tries[cell.id] < TRIES:
                        waiting.appendleft(cell)
                    else:
                        yield record_failure(cell, work.folder(cell), died)
                else:
                    if kind == "progress":
                        tell(cell, *message)
                        continue
                    yield message
                worker.cell = None
                if waiting:
                    worker.begin(waiting.popleft())
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that does one cell at a time, as seen from the process that started it."""

    def __init__(self, work: Work, number: int, count: int) -> None:
        self.settings = work, number, count
        self.cell: CellConfig | None = None
        self._start()

    def _start(self) -> None:
        context = _context()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, *self.settings), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends with the process

    def begin(self, cell: CellConfig) -> None:
        """Hand it a cell; a process that is not there any more shows when it is listened to."""
        self.cell = cell
        with suppress(OSError):
            self.pipe.send(cell)

    def replace(self) -> Died:
        """Put a new process in the place of a dead one, and tell how that died."""
        self.process.join()
        self.pipe.close()
        code = self.process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._start()
        return Died(
            f"its process died {TRIES} times, the last time by {how}. SIGKILL is most often the system's answer to too "
            "little memory: use fewer workers, or a smaller batch_size."
        )

    def stop(self) -> None:
        """End the process: idle, it just goes; in a training, it finishes its step and saves."""
        self.pipe.close()
        if self.cell and self.process.is_alive():
            self.process.terminate()
        self.process.join()


def _context() -> Any:
    """How processes start: where it can be done, forked from one that has imported everything and done nothing yet."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _serve(pipe: Connection, work: Work, number: int, count: int) -> None:
    """A worker's life: cells in, progress and records out, until the other end of the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of a terminal's processes: the first decides
    torch.set_num_threads(threads(count))
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(number % torch.cuda.device_count())
    for plugin in work.plugins:
        load_plugin(plugin)

    def send(kind: str, message: Any) -> None:
        try:
            pipe.send((kind, message))
        except OSError:  # nobody listens any more; no failure of the cell
            raise SystemExit from None

    try:
        while True:
            cell = pipe.recv()
            send("done", attempt(cell, work, lambda *progress: send("progress", progress)))
    except (EOFError, KeyboardInterrupt):
        return


def threads(count: int) -> int:
    """The share of this machine's cores, as far as they are ours, of one of `count` processes; at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // count)
