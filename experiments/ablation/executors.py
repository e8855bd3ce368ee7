"""How the cells of a run are executed: one after another in this process, or several at a time in worker processes.

`ray_executor` has a cluster's. An executor is a function of the cells, the run's settings and a progress callback; it
yields each cell's result, or None for a cell that another run works on or has settled.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from os import getpid
from pathlib import Path
from time import time
from typing import Any

import torch

from experiments.ablation.cell import open_cell_context, run_cell, training_key
from experiments.ablation.result import CellResult, is_settled, write_result
from experiments.config import CellConfig
from experiments.core.devices import threads_per_process
from experiments.core.files import read_json, write_json
from experiments.core.locks import try_lock
from experiments.core.plugins import load_plugin
from experiments.core.progress import ProgressCallback

CellProgressCallback = Callable[[CellConfig, str, int, int], None]
"""Called as (cell, phase, done, total)."""
ATTEMPTS = 2
PROGRESS = "progress.json"
_RUST_PANIC = "pyo3_runtime"  # the module of panics of libraries in Rust, which are no subclasses of Exception


@dataclass(frozen=True)
class RunSettings:
    """What every process of a run needs to know.

    Attributes:
        directory: the run's.
        since: when the run started, in seconds since the epoch; cells that failed before are tried again.
        plugins: files that register mixers, objectives or metrics.
    """

    directory: Path
    since: float
    plugins: tuple[Path, ...] = ()

    def cell_folder(self, cell: CellConfig) -> Path:
        """Return the folder of a cell."""
        return self.directory / "cells" / cell.id


CellExecutor = Callable[[Sequence[CellConfig], RunSettings, CellProgressCallback], Iterator[CellResult | None]]


class WorkerDied(RuntimeError):
    """A worker process ended while it ran a cell."""


def attempt_cell(cell: CellConfig, settings: RunSettings, progress: ProgressCallback) -> CellResult | None:
    """Run a cell unless another process runs it or has settled it; an error becomes the cell's result.

    Returns:
        The result, or None if there was nothing to do here.
    """
    folder = settings.cell_folder(cell)
    with try_lock(folder) as acquired:
        if not acquired:
            return None
        try:
            with record_progress(folder, progress) as report:
                report("load", 0, 1)
                context = open_cell_context(cell)
                if is_settled(folder, settings.since, training_key(cell, context)):
                    return None
                return run_cell(cell, context, folder, report)
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__module__ != _RUST_PANIC:
                raise
            return record_failure(cell, folder, error)


def record_failure(cell: CellConfig, folder: Path, error: BaseException) -> CellResult:
    """Write the result of a cell that failed."""
    result = CellResult.failure(cell, error)
    write_result(folder, result)
    return result


def read_progress(folder: Path) -> dict[str, Any]:
    """Return what `record_progress` wrote last in a cell's folder; empty if there is nothing or it is damaged."""
    state = read_json(folder / PROGRESS)
    has_numbers = all(isinstance(state.get(name), int | float) for name in ("done", "total", "time", "start"))
    return state if has_numbers and isinstance(state.get("phase"), str) else {}


@contextmanager
def record_progress(folder: Path, progress: ProgressCallback) -> Iterator[ProgressCallback]:
    """Yield a callback that also writes `folder/progress.json`, about once a second and at every new phase."""
    path = folder / PROGRESS
    start = time()
    last: dict[str, Any] = {"phase": None, "time": 0.0}

    def report(phase: str, done: int, total: int) -> None:
        if phase != last["phase"] or time() - last["time"] > 1:
            last.update(phase=phase, time=time())
            write_json(path, {**last, "done": done, "total": total, "start": start, "process": getpid()})
        progress(phase, done, total)

    try:
        yield report
    finally:
        path.unlink(missing_ok=True)


def run_serially(
    cells: Sequence[CellConfig], settings: RunSettings, progress: CellProgressCallback
) -> Iterator[CellResult | None]:
    """Run one cell after another in this process."""
    for cell in cells:
        yield attempt_cell(cell, settings, partial(progress, cell))


def run_in_processes(
    cells: Sequence[CellConfig], settings: RunSettings, progress: CellProgressCallback, count: int
) -> Iterator[CellResult | None]:
    """Run `count` cells at a time, each in a process with its share of the cores, and of the GPUs if there are several.

    A cell whose process dies is tried again, once, from its last checkpoint, in a new process.
    """
    waiting = deque(cells)
    attempts = Counter[str]()
    count = min(count, len(cells))
    workers = [_Worker(settings, number, count) for number in range(count)]
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
                    attempts[cell.id] += 1
                    error = worker.replace()
                    if attempts[cell.id] < ATTEMPTS:
                        waiting.appendleft(cell)
                    else:
                        yield record_failure(cell, settings.cell_folder(cell), error)
                else:
                    if kind == "progress":
                        progress(cell, *message)
                        continue
                    yield message
                worker.cell = None
                if waiting:
                    worker.begin(waiting.popleft())
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that runs one cell at a time, as seen from the process that started it."""

    def __init__(self, settings: RunSettings, number: int, count: int) -> None:
        self._arguments = (settings, number, count)
        self.cell: CellConfig | None = None
        self._start()

    def _start(self) -> None:
        context = _process_context()
        self.pipe, worker_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(worker_end, *self._arguments), daemon=True)
        self.process.start()
        worker_end.close()  # so that the pipe ends with the process

    def begin(self, cell: CellConfig) -> None:
        """Send a cell; if the process is dead, receiving from it will say so."""
        self.cell = cell
        with suppress(OSError):
            self.pipe.send(cell)

    def replace(self) -> WorkerDied:
        """Start a new process in place of a dead one and return how that died."""
        self.process.join()
        self.pipe.close()
        code = self.process.exitcode or 0
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._start()
        return WorkerDied(
            f"its process died {ATTEMPTS} times, the last time by {cause}. SIGKILL is usually the system's response to "
            "too little memory: use fewer workers, or a smaller batch_size."
        )

    def stop(self) -> None:
        """End the process: an idle one exits at once, one that trains finishes its step and saves."""
        self.pipe.close()
        if self.cell and self.process.is_alive():
            self.process.terminate()
        self.process.join()


def _process_context() -> Any:
    """How processes start: forked from a server that has imported everything, if the system can do that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _serve(pipe: Connection, settings: RunSettings, number: int, count: int) -> None:
    """Run cells in a worker: cells come in, progress and results go out, until the other end of the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the first one decides
    torch.set_num_threads(threads_per_process(count))
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(number % torch.cuda.device_count())
    for plugin in settings.plugins:
        load_plugin(plugin)

    def send(kind: str, message: Any) -> None:
        try:
            pipe.send((kind, message))
        except OSError:  # the other process has ended, which is no failure of the cell
            raise SystemExit from None

    try:
        while True:
            cell = pipe.recv()
            send("done", attempt_cell(cell, settings, lambda *progress: send("progress", progress)))
    except (EOFError, KeyboardInterrupt):
        return
