"""metrics.jsonl, and the trackers."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from accelerate import Accelerator

from experiments.training.checkpoints import write_file

_log = logging.getLogger(__name__)


class Log:
    """One record every few steps, written by the main process.

    The file depends on the training alone, so that it can be compared: what takes time is told to the trackers only.
    """

    def __init__(self, directory: Path, accelerator: Accelerator) -> None:
        self._file, self._accelerator = directory / "metrics.jsonl", accelerator
        self._last = (0, time.perf_counter())
        self._cut = False  # whether the last line may be half a line

    def until(self, step: int) -> list[dict[str, float]]:
        """The records up to a step; later ones, of a run that was killed, are dropped."""
        self._last = (step, time.perf_counter())
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        kept = [record for record in map(_record, lines) if record is not None and record["step"] <= step]
        if self._accelerator.is_main_process:
            write_file(self._file, "".join(json.dumps(record) + "\n" for record in kept).encode())
        return kept

    def write(self, step: int, losses: dict[str, float], rate: float, items: int) -> dict[str, float]:
        """Add a record; the trackers also get the learning rate, and the samples a second of `items` a step."""
        record = {"step": step, **losses}
        if self._accelerator.is_main_process:
            try:
                with self._file.open("a", encoding="utf-8") as file:
                    file.write("\n" * self._cut + json.dumps(record) + "\n")
                self._cut = False
            except OSError as error:  # a full disk: the training is worth more than its log
                self._cut = True
                _log.warning("Step %d is not in %s: %s.", step, self._file, error)
        (before, then), now = self._last, time.perf_counter()
        self._last = (step, now)
        speed = (step - before) * items / (now - then)
        self._accelerator.log({**losses, "learning_rate": rate, "samples_per_second": speed}, step=step)
        return record

    def close(self) -> None:
        """Finish the trackers; the processes stay together, for the next training."""
        for tracker in self._accelerator.trackers:
            tracker.finish()


def _record(line: str) -> dict[str, float] | None:
    try:
        record: dict[str, float] = json.loads(line)
    except ValueError:  # half a line, of a run that was killed or of a disk that was full
        return None
    return record
