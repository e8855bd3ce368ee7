"""Find and load a grid: a plain Python file that exposes `GRID`."""

from __future__ import annotations

import runpy
from pathlib import Path

from experiments.config import Grid
from mixers.suggest import hint

_READY_MADE = Path(__file__).parent.parent / "grids"


def list_grids() -> list[str]:
    """Names of the grids that ship with the package."""
    return sorted(p.stem for p in _READY_MADE.glob("*.py") if p.stem != "__init__")


def load_grid(source: str) -> Grid:
    """A ready-made grid by name ("demo"), or the `GRID` of a Python file of your own.

    Raises:
        ValueError: no such grid or file, or the file does not expose a `Grid` named GRID.
    """
    path = Path(source) if source.endswith(".py") else _READY_MADE / f"{source}.py"
    if not path.is_file():
        raise ValueError(
            f"No grid {source!r}: expected one of {', '.join(list_grids())}, or the path of a .py file."
            f"{hint(source, list_grids())}"
        )
    try:
        grid = runpy.run_path(str(path)).get("GRID")
    except Exception as error:  # whatever is wrong with the user's file, it is one sentence
        raise ValueError(f"Cannot load the grid {path}: {type(error).__name__}: {error}") from error
    if not isinstance(grid, Grid):
        raise ValueError(
            f"{path} does not expose GRID = Grid(...): got {type(grid).__name__}. See experiments/grids/demo.py."
        )
    return grid
