"""Records on disk: JSON files that are there whole or not at all; claims that end with the process that made them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from time import time
from typing import Any

import torch
from filelock import FileLock, Timeout

Tell = Callable[[str, int, int], None]

LOCK, PROGRESS, RESULT = ".lock", "progress.json", "result.json"


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing, damaged or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def finished(directory: Path) -> bool:
    """Whether the cell in `directory` is done; a failed, damaged or unfinished one is not and runs again."""
    return read_json(directory / RESULT).get("status") == "done"


def settled(directory: Path, since: float) -> bool:
    """Whether the cell has a result that stands: it is done, or it failed after `since` (seconds of the epoch)."""
    path = directory / RESULT
    return finished(directory) or (path.is_file() and path.stat().st_mtime >= since)


@contextmanager
def claim(directory: Path) -> Iterator[bool]:
    """Hold the cell in `directory` for this process alone; False where another one has it.

    The system's own lock on a file: it ends with the process, however that ends. Over several machines the file
    system has to support it, as NFS does.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=0.2, poll_interval=0.02)  # somebody may only be looking, as `claimed` does
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def claimed(directory: Path) -> bool:
    """Whether some process has the cell in hand."""
    if not (directory / LOCK).exists():
        return False
    try:
        with FileLock(directory / LOCK, timeout=0):
            return False
    except Timeout:
        return True


@contextmanager
def noted(directory: Path, tell: Tell) -> Iterator[Tell]:
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


def environment() -> dict[str, str]:
    """What the numbers were measured with."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "linear-token-mixers")
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            found[name] = "not installed as a package"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), "system": platform.platform(terse=True), "device": device, **found}
