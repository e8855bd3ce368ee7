"""metrics.jsonl, and the trackers."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from accelerate import Accelerator

from experiments.core.files import parse_json_object, write_bytes

_log = logging.getLogger(__name__)


class MetricsLog:
    """One record every few steps, written by the main process.

    The file depends on the training alone, so that two runs can be compared byte for byte: learning rate and speed go
    to the trackers only.
    """

    def __init__(self, directory: Path, accelerator: Accelerator) -> None:
        self._file = directory / "metrics.jsonl"
        self._accelerator = accelerator
        self._last = (0, time.perf_counter())
        self._cut = False  # whether the last line may be incomplete

    def truncate(self, step: int) -> list[dict[str, float]]:
        """Drop the records after a step, which a killed run left, and return those up to it."""
        self._last = (step, time.perf_counter())
        lines = self._file.read_text(encoding="utf-8", errors="replace").splitlines() if self._file.exists() else []
        records = [record for record in map(_parse, lines) if record is not None and record["step"] <= step]
        if self._accelerator.is_main_process:
            write_bytes(self._file, "".join(json.dumps(record) + "\n" for record in records).encode())
        return records

    def write(self, step: int, losses: dict[str, float], rate: float, items: int) -> dict[str, float]:
        """Add a record and return it.

        Args:
            step: completed steps.
            losses: by name.
            rate: the learning rate, for the trackers.
            items: samples a step, for the trackers' samples a second.
        """
        record = {"step": step, **losses}
        if self._accelerator.is_main_process:
            try:
                with self._file.open("a", encoding="utf-8") as file:
                    file.write("\n" * self._cut + json.dumps(record) + "\n")
                self._cut = False
            except OSError as error:  # a full disk: the training is worth more than its log
                self._cut = True
                _log.warning("Cannot write step %d to %s: %s.", step, self._file, error)
        before, then = self._last
        now = time.perf_counter()
        self._last = (step, now)
        speed = (step - before) * items / (now - then)
        self._accelerator.log({**losses, "learning_rate": rate, "samples_per_second": speed}, step=step)
        return record

    def close(self) -> None:
        """Finish the trackers; the processes stay connected for the next training."""
        for tracker in self._accelerator.trackers:
            tracker.finish()


def _parse(line: str) -> dict[str, float] | None:
    try:
        record = parse_json_object(line)
    except ValueError:  # half a line, of a run that was killed or of a disk that was full
        return None
    return record if isinstance(record.get("step"), int) else None
