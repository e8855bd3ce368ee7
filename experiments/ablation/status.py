"""How far a run is, from its files alone: what is done, running, failed and waiting, and how long is left."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from time import time
from typing import Any

from experiments.ablation import store
from experiments.core.files import read_json
from experiments.core.locks import is_locked

STATES = ("done", "running", "failed", "waiting")


@dataclass(frozen=True)
class CellStatus:
    """One cell.

    Attributes:
        state: one of STATES.
        seconds: that it took, or has run for.
        left: seconds that it still needs, about; NaN where nothing is known yet.
        told: its phase, or its error.
    """

    id: str
    variant: str
    seed: int
    state: str
    seconds: float
    left: float
    told: str


@dataclass(frozen=True)
class RunStatus:
    """A run: its name, the labels of its variants, and its cells in their order."""

    name: str
    labels: dict[str, str]
    cells: tuple[CellStatus, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Cells by state."""
        found = Counter(cell.state for cell in self.cells)
        return {state: found[state] for state in STATES}

    @property
    def left(self) -> float:
        """Seconds to the end with as many cells at a time as now run, at least one; NaN where nothing is known yet.

        Failed cells are not counted: only a new run tries them again.
        """
        return sum(cell.left for cell in self.cells) / max(1, self.counts["running"])


def read_status(directory: Path) -> RunStatus:
    """The state of a run's folder, whether or not it is running.

    Raises:
        ValueError: there is no grid.json, or one without cells.
    """
    grid = read_json(directory / "grid.json")
    try:
        cells = [{key: row[key] for key in ("id", "variant", "seed")} for row in grid["cells"]]
        labels = {str(v["name"]): str(v["label"]) for v in grid["variants"]}
        name = str(grid["name"])
    except (KeyError, TypeError):
        cells = []
    if not cells:
        raise ValueError(
            f"{directory} is no run's folder: expected a grid.json with cells there, as `mixlab ablate` writes it."
        )
    found = [(row, *_look(directory / "cells" / row["id"])) for row in cells]
    took: dict[str | None, list[float]] = {}
    for row, state, notes in found:
        if state == "done":
            for key in (row["variant"], None):
                took.setdefault(key, []).append(float(notes.get("seconds", math.nan)))
    paces = [pace for _, state, notes in found if state == "running" for pace in _pace(notes)]

    def expected(variant: str) -> float:
        """Of a whole cell: what this variant took, else what any did, else by the trainings that run."""
        return mean(took.get(variant) or took.get(None) or paces or [math.nan])

    told = (_status(row, state, notes, expected(row["variant"])) for row, state, notes in found)
    return RunStatus(name, labels, tuple(told))


def _look(folder: Path) -> tuple[str, dict[str, Any]]:
    """The state of a cell's folder, and its record or progress."""
    if is_locked(folder):
        return "running", read_json(folder / store.PROGRESS)
    record = read_json(folder / store.RESULT)
    return (record["status"] if record.get("status") in STATES else "waiting"), record


def _pace(progress: dict[str, Any]) -> Iterable[float]:
    """Seconds for the whole of what is now counted."""
    if progress.get("done") and progress.get("total"):
        yield (progress["time"] - progress["began"]) * progress["total"] / progress["done"]


def _status(row: dict[str, Any], state: str, notes: dict[str, Any], expected: float) -> CellStatus:
    left, seconds, told = {"waiting": expected}.get(state, 0.0), float(notes.get("seconds", 0.0)), ""
    if state == "failed":
        told = str(notes.get("error"))
    elif state == "running":
        seconds = time() - notes.get("began", time())
        left = max(0.0, expected - seconds)
        told = "{phase} {done}/{total}".format_map({"phase": "starting", "done": 0, "total": 1, **notes})
    return CellStatus(row["id"], row["variant"], row["seed"], state, seconds, left, told)
