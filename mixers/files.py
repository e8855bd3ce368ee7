"""Files that are replaced as a whole, so that a reader never sees half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


@contextmanager
def atomic_path(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path` and move what was written there to `path` when the block ends.

    If the block raises, `path` stays as it was and the temporary file or folder is deleted. The temporary name contains
    the process id, so that two processes can write the same path; the last one wins.

    Args:
        path: a file, or a folder that does not exist yet. Missing parent folders are created.
        durable: flush the file and its name to the disk first, so that both survive a power failure.

    Raises:
        OSError: the disk is full or fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    _remove(partial)
    try:
        yield partial
        if durable:
            _flush(partial)
        os.replace(partial, path)
    finally:
        _remove(partial)
    if durable and hasattr(os, "O_DIRECTORY"):
        _flush(path.parent, os.O_DIRECTORY)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
