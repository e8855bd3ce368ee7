"""Find and load a grid: a plain Python file that exposes `GRID`."""

from __future__ import annotations

import runpy
from pathlib import Path

from experiments.config import Grid
from mixers.suggest import unknown_name

_READY_MADE = Path(__file__).parent.parent / "grids"


def list_grids() -> list[str]:
    """Return the names of the grids that ship with the package."""
    return sorted(p.stem for p in _READY_MADE.glob("*.py") if p.stem[0] != "_" and p.stem != "shared")


def load_grid(source: str) -> Grid:
    """Load a ready-made grid by name ("demo"), or the `GRID` of a Python file.

    Raises:
        ValueError: there is no such grid or file, or the file does not expose a `Grid` named GRID.
    """
    path = Path(source) if source.endswith(".py") else _READY_MADE / f"{source}.py"
    if not path.is_file():
        raise ValueError(unknown_name("grid", source, list_grids(), "the path of a .py file"))
    try:
        grid = runpy.run_path(str(path)).get("GRID")
    except (Exception, SystemExit) as error:  # the file is the user's code, which can raise anything
        raise ValueError(f"Cannot load the grid {path}: {type(error).__name__}: {error}") from error
    if not isinstance(grid, Grid):
        raise ValueError(
            f"{path} does not expose GRID = Grid(...): got {type(grid).__name__}. See experiments/grids/demo.py."
        )
    return grid
