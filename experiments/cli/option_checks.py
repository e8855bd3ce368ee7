"""Checks of options before a command works: where it writes, so that no result is lost at the end, and its numbers."""

from __future__ import annotations

import math
import os
from pathlib import Path

import typer


def check_folder(path: Path | None) -> Path | None:
    """Refuse a folder that cannot be created or written; a callback of an option.

    Raises:
        typer.BadParameter: it, or the nearest folder above it that exists, is a file or not writable.
    """
    if path is None:
        return None
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir():
        raise typer.BadParameter(f"{existing} is a file, not a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"the folder {existing} is not writable.")
    return path


def check_file(path: Path | None) -> Path | None:
    """Refuse a file that cannot be created or replaced; a callback of an option.

    Raises:
        typer.BadParameter: it is a folder, or its folder cannot be created or written.
    """
    if path is None:
        return None
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; expected the name of a file.")
    check_folder(path.absolute().parent)
    return path


def check_finite(value: float | None) -> float | None:
    """Refuse infinity and what is not a number; a callback of an option.

    Raises:
        typer.BadParameter: the value is not finite.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value
