"""Kill a training at random moments, again and again, and compare its result with that of an undisturbed training.

    python -m experiments.studies.crash_test [--kills 20] [--distill]

The signal is SIGKILL, whatever the process does: every other one comes as soon as a checkpoint is being written, the
others at any time. With `--distill` the training is a distillation of the embedded teacher, otherwise a small
regression. The exit code is 0 if the weights and the log are bit-identical.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from experiments.training.checkpoints import FOLDER
from mixers.files import PARTIAL

WEIGHTS = "weights.safetensors"
LOG = "metrics.jsonl"
POLL_SECONDS = 0.005


@dataclass(frozen=True)
class CrashTestResult:
    """What a crash test observed.

    Attributes:
        identical: whether the weights and the log are bit-identical to those of the undisturbed training.
        kills: number of processes that were killed while they trained.
        interrupted_writes: how many of them left a checkpoint half written.
        start_steps: the step at which each process started; 0 for the first.
    """

    identical: bool
    kills: int
    interrupted_writes: int
    start_steps: tuple[int, ...]


def crash_test(
    folder: Path, kills: int = 20, steps: int = 60, pause: float = 0.05, distill: bool = False
) -> CrashTestResult:
    """Train undisturbed, then with SIGKILLs at random moments, and compare the results.

    Args:
        folder: for both trainings.
        kills: number of processes to kill.
        steps: of the training.
        pause: seconds that are added to each step, so that there is time for the kills.
        distill: train a distillation of the embedded teacher instead of a small regression.

    Raises:
        RuntimeError: a training fails by itself.
    """
    undisturbed = folder / "undisturbed"
    killed = folder / "killed"
    _start_training(undisturbed, steps, 0.0, distill).wait()
    delays = random.Random(0)
    completed_kills = 0
    interrupted_writes = 0
    start_steps = []
    while not (killed / WEIGHTS).is_file():
        start_steps.append(_last_checkpoint_step(killed))
        start_time = time.time_ns()
        process = _start_training(killed, steps, pause, distill)
        if completed_kills < kills:
            delay = None if completed_kills % 2 == 0 else delays.uniform(0.0, pause * steps / kills)
            completed_kills += _kill(process, killed, start_time, delay)
            interrupted_writes += _last_partial_write(killed) > start_time
        elif process.wait() != 0:
            raise RuntimeError(f"The training failed by itself; its folder is {killed}.")
    identical = all((undisturbed / name).read_bytes() == (killed / name).read_bytes() for name in (WEIGHTS, LOG))
    return CrashTestResult(identical, completed_kills, interrupted_writes, tuple(start_steps))


def _start_training(folder: Path, steps: int, pause: float, distill: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "experiments.studies.crash_test.training", str(folder)]
    command += ["--steps", str(steps), "--pause", str(pause)]
    if distill:
        command.append("--distill")
    return subprocess.Popen(command, cwd=Path(__file__).parents[3])


def _last_checkpoint_step(folder: Path) -> int:
    checkpoints = sorted((folder / FOLDER).glob("step-*.safetensors"))
    return int(checkpoints[-1].stem.removeprefix("step-")) if checkpoints else 0


def _logged_steps(folder: Path, since: int) -> int:
    """Return how many steps the log has, or 0 if nothing was written to it since that time in nanoseconds."""
    log = folder / LOG
    return len(log.read_text().splitlines()) if log.is_file() and log.stat().st_mtime_ns > since else 0


def _last_partial_write(folder: Path) -> int:
    """Return when an incomplete checkpoint was last written to, in nanoseconds; 0 if there is none."""
    times = [0]
    for path in (folder / FOLDER).glob(f"*{PARTIAL}"):
        with suppress(FileNotFoundError):  # it has been completed
            times.append(path.stat().st_mtime_ns)
    return max(times)


def _kill(process: subprocess.Popen[bytes], folder: Path, since: int, delay: float | None) -> bool:
    """Kill a training.

    Args:
        process: of the training.
        folder: of the training.
        since: when it started, in nanoseconds.
        delay: seconds after its first step; None: as soon as it writes a checkpoint.

    Returns:
        Whether it was still running.
    """
    start_step = _last_checkpoint_step(folder)
    while process.poll() is None and _logged_steps(folder, since) <= start_step:
        time.sleep(POLL_SECONDS)
    while delay is None and process.poll() is None and _last_partial_write(folder) <= since:
        pass
    time.sleep(delay or 0.0)
    process.kill()
    return process.wait() != 0


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pause", type=float, default=0.05)
    parser.add_argument("--distill", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = crash_test(Path(folder), options.kills, options.steps, options.pause, options.distill)
    steps = ", ".join(map(str, result.start_steps))
    print(
        f"killed {result.kills} times, {result.interrupted_writes} of them while a checkpoint was written; "
        f"resumed after steps {steps}"
    )
    print("weights and log are bit-identical" if result.identical else "WEIGHTS OR LOG DIFFER")
    return 0 if result.identical else 1
