"""A session of measurements on borrowed hardware: steps in order of value, within a time budget.

Every step is a process of its own, which is killed when its time is over. What it printed and whether it succeeded is
on disk when it ends, so that a session can be cut off anywhere. A dry run executes the same steps at tiny sizes on the
CPU.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from experiments.core.files import write_json
from experiments.core.timing import Clock
from mixers.files import atomic_path

LOG = "log.txt"
STEPS = "steps.json"
MIN_SECONDS = 10.0
"""A step that has less time left is skipped."""

STARTUP_SECONDS = 15.0
"""For starting a process and writing its results; a step's own budget is shorter by this."""


@dataclass(frozen=True)
class SessionStep:
    """One measurement.

    Attributes:
        name: for the log.
        max_seconds: its process is killed after this time.
        arguments: of the Python interpreter, beginning with "-m". `{out}` stands for the results folder and `{seconds}`
            for the step's own time budget.
        dry_arguments: the same at tiny sizes on the CPU.
        is_required: whether the session ends if this step fails.
    """

    name: str
    max_seconds: float
    arguments: tuple[str, ...]
    dry_arguments: tuple[str, ...]
    is_required: bool = False


@dataclass(frozen=True)
class StepOutcome:
    """How a step ended.

    Attributes:
        name: of the step.
        status: "succeeded", "failed", "killed" (its time was over) or "skipped".
        seconds: that it took.
        reason: of a failure or a skip.
    """

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""


RunProcess = Callable[[Sequence[str], float, TextIO], int | None]
"""Takes (arguments, seconds, log), runs Python with them, and returns the exit code; None if it had to be killed."""


def run_session(
    steps: Sequence[SessionStep],
    out: Path,
    budget_seconds: float,
    *,
    dry_run: bool = False,
    archive: Path | None = None,
    run_process: RunProcess | None = None,
    clock: Clock = time.perf_counter,
) -> list[StepOutcome]:
    """Run steps in their order until the budget is spent.

    Args:
        steps: the most valuable first.
        out: folder that receives log.txt, steps.json and the steps' results.
        budget_seconds: for all steps.
        dry_run: run the steps' `dry_arguments`.
        archive: a .tar.gz file that receives the whole folder after every step.
        run_process: runs a step; None: `run_subprocess`, or `run_in_this_process` in a dry run, which saves the time of
            starting Python.
        clock: source of the time, in seconds.

    Returns:
        The outcome of every step.
    """
    run_process = run_process or (run_in_this_process if dry_run else run_subprocess)
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[StepOutcome] = []
    deadline = clock() + budget_seconds
    reason = ""
    with (out / LOG).open("a", encoding="utf-8") as log:
        for step in steps:
            seconds = min(step.max_seconds, deadline - clock())
            if not reason and seconds < MIN_SECONDS:
                reason = "the time budget is spent"
            if reason:
                outcome = StepOutcome(step.name, "skipped", reason=reason)
            else:
                outcome = _run_step(step, seconds, out, dry_run, run_process, log, clock)
            outcomes.append(outcome)
            _print(f"== {outcome.name}: {outcome.status} {outcome.reason} ({outcome.seconds:.0f} s)", log)
            write_json(out / STEPS, [asdict(o) for o in outcomes])
            if archive is not None:
                _pack(out, archive)
            if step.is_required and outcome.status in ("failed", "killed"):
                reason = f"{step.name} did not succeed"
    return outcomes


def _run_step(
    step: SessionStep, seconds: float, out: Path, dry_run: bool, run_process: RunProcess, log: TextIO, clock: Clock
) -> StepOutcome:
    own_seconds = f"{max(1.0, seconds - STARTUP_SECONDS):.0f}"
    templates = step.dry_arguments if dry_run else step.arguments
    arguments = [text.replace("{out}", str(out)).replace("{seconds}", own_seconds) for text in templates]
    _print(f"== {step.name}: python {' '.join(arguments)}", log)
    start = clock()
    exit_code = run_process(arguments, seconds, log)
    elapsed = clock() - start
    if exit_code is None:
        return StepOutcome(step.name, "killed", elapsed, f"after {seconds:.0f} s")
    if exit_code != 0:
        return StepOutcome(step.name, "failed", elapsed, f"exit code {exit_code}")
    return StepOutcome(step.name, "succeeded", elapsed)


def run_subprocess(arguments: Sequence[str], seconds: float, log: TextIO) -> int | None:
    """Run Python in a process of its own, with its output on the terminal and in the log."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    timed_out = threading.Event()

    def kill() -> None:
        timed_out.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            _print(line.rstrip("\n"), log)
        exit_code = process.wait()
    finally:
        timer.cancel()
    return None if timed_out.is_set() else exit_code


def run_in_this_process(arguments: Sequence[str], seconds: float, log: TextIO) -> int | None:
    """Run `-m module arguments…` inside this process, with its output in the log; nothing is killed."""
    _, module, *rest = arguments
    if module == "pytest":  # which cannot run inside a test
        return run_subprocess(arguments, seconds, log)
    argv = sys.argv
    handler = signal.getsignal(signal.SIGTERM)  # which the command line replaces
    sys.argv = [module, *rest]
    try:
        with redirect_stdout(log), redirect_stderr(log):
            runpy.run_module(module, run_name="__main__", alter_sys=False)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    return 0


def print_outcomes(outcomes: Sequence[StepOutcome]) -> None:
    """Print a line per step."""
    for outcome in outcomes:
        print(f"{outcome.status:>9}  {outcome.seconds:5.0f} s  {outcome.name}  {outcome.reason}")


def _print(line: str, log: TextIO) -> None:
    print(line, flush=True)
    print(line, file=log, flush=True)


def _pack(folder: Path, archive: Path) -> None:
    with atomic_path(archive) as partial, tarfile.open(partial, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
