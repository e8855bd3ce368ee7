"""Locks on folders, held by one process and released by the system when that process ends, however it ends.

Across machines the file system has to support them, as NFS does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"


@contextmanager
def try_lock(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock inside the block; yields False, without waiting, if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0.2, poll_interval=0.02)  # `is_locked` in another process holds it for an instant
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def lock_folder(folder: Path, activity: str) -> Iterator[None]:
    """Hold a folder's lock inside the block.

    Args:
        folder: created if it is missing.
        activity: what the lock is for, such as "distillation"; part of the message.

    Raises:
        ValueError: another process holds the lock.
    """
    with try_lock(folder) as acquired:
        if not acquired:
            raise ValueError(
                f"Another {activity} is running in {folder}. Wait until it ends, stop it, or give another folder."
            )
        yield


def is_locked(folder: Path) -> bool:
    """Return whether some process holds the folder's lock now."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
