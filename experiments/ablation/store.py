"""The records of a cell on disk: its result and its progress."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import time
from typing import Any

from experiments.core.files import read_json, write_json
from experiments.core.progress import ProgressCallback

PROGRESS = "progress.json"
RESULT = "result.json"


def finished(directory: Path) -> bool:
    """Whether the cell in `directory` is done; a failed, damaged or unfinished one is not and runs again."""
    return read_json(directory / RESULT).get("status") == "done"


def settled(directory: Path, since: float) -> bool:
    """Whether the cell has a result that stands: it is done, or it failed after `since` (seconds of the epoch)."""
    path = directory / RESULT
    return finished(directory) or (path.is_file() and path.stat().st_mtime >= since)


@contextmanager
def noted(directory: Path, tell: ProgressCallback) -> Iterator[ProgressCallback]:
    """A `tell` that also notes the progress in the cell's folder, about once a second and at every new phase."""
    path, began = directory / PROGRESS, time()
    last: dict[str, Any] = {"phase": None, "time": 0.0}

    def note(phase: str, done: int, total: int) -> None:
        if phase != last["phase"] or time() - last["time"] > 1:
            last.update(phase=phase, time=time())
            write_json(path, {**last, "done": done, "total": total, "began": began, "process": os.getpid()})
        tell(phase, done, total)

    try:
        yield note
    finally:
        path.unlink(missing_ok=True)


def failure(cell: str, variant: str, seed: int, error: BaseException) -> dict[str, Any]:
    """The record of a cell that failed."""
    return {
        "cell": cell,
        "variant": variant,
        "seed": seed,
        "status": "failed",
        "error": f"{type(error).__name__}: {error}",
        "trained_parameters": 0,
        "train_seconds": 0.0,
        "steps": 0,
        "fidelity": [],
        "speed": [],
    }
