"""The state of a run from its files alone: which cells are done, running, failed and waiting, and the time left."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from time import time
from typing import Any

from pydantic import ValidationError

from experiments.ablation.description import FILE, CellDescription, RunDescription
from experiments.ablation.executors import read_progress
from experiments.ablation.result import read_result
from experiments.core.files import read_json
from experiments.core.locks import is_locked

STATES = ("done", "running", "failed", "waiting")


@dataclass(frozen=True)
class CellStatus:
    """One cell.

    Attributes:
        id, variant, seed: of the cell.
        state: one of STATES.
        seconds: that it took, or has run for.
        seconds_left: estimate; NaN if nothing is known yet.
        message: its phase if it runs, its error if it failed.
    """

    id: str
    variant: str
    seed: int
    state: str
    seconds: float
    seconds_left: float
    message: str


@dataclass(frozen=True)
class RunStatus:
    """A run: its name, the labels of its variants, and its cells in their order."""

    name: str
    labels: dict[str, str]
    cells: tuple[CellStatus, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Cells by state."""
        counter = Counter(cell.state for cell in self.cells)
        return {state: counter[state] for state in STATES}

    @property
    def seconds_left(self) -> float:
        """Seconds to the end with as many cells at a time as now run, at least one; NaN if nothing is known yet.

        Failed cells are not counted: only a new run tries them again.
        """
        return sum(cell.seconds_left for cell in self.cells) / max(1, self.counts["running"])


def read_status(directory: Path) -> RunStatus:
    """Read the state of a run's folder, whether or not it is running.

    Raises:
        ValueError: there is no grid.json, or it has no cells.
    """
    try:
        description = RunDescription.model_validate(read_json(directory / FILE))
    except ValidationError:
        description = RunDescription(name="")
    if not description.cells:
        raise ValueError(
            f"{directory} is not the folder of a run: expected a {FILE} with cells there, as `mixlab ablate` writes it."
        )
    states = [(cell, *_inspect(directory / "cells" / cell.id)) for cell in description.cells]
    durations: dict[str | None, list[float]] = {}
    for cell, state, details in states:
        if state == "done":
            for key in (cell.variant, None):
                durations.setdefault(key, []).append(float(details["seconds"]))
    projections = [seconds for _, state, details in states if state == "running" for seconds in _project(details)]

    def expected(variant: str) -> float:
        """Seconds of a whole cell: the variant's mean, any cell's, or extrapolated from the running cells."""
        return mean(durations.get(variant) or durations.get(None) or projections or [math.nan])

    labels = {variant.name: variant.label for variant in description.variants}
    cells = tuple(_status(cell, state, details, expected(cell.variant)) for cell, state, details in states)
    return RunStatus(description.name, labels, cells)


def _inspect(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the state of a cell's folder, and its progress or what its result says."""
    if is_locked(folder):
        return "running", read_progress(folder)
    result = read_result(folder)
    if result is None:
        return "waiting", {}
    return result.status, {"seconds": result.seconds, "error": result.error}


def _project(progress: dict[str, Any]) -> Iterable[float]:
    """Extrapolate the present phase to its end, in seconds."""
    if progress.get("done") and progress.get("total"):
        yield (progress["time"] - progress["start"]) * progress["total"] / progress["done"]


def _status(cell: CellDescription, state: str, details: dict[str, Any], expected: float) -> CellStatus:
    seconds = float(details.get("seconds", 0.0))
    seconds_left = expected if state == "waiting" else 0.0
    message = ""
    if state == "failed":
        message = str(details["error"])
    elif state == "running":
        seconds = time() - details.get("start", time())
        seconds_left = max(0.0, expected - seconds)
        message = "{phase} {done}/{total}".format_map({"phase": "starting", "done": 0, "total": 1, **details})
    return CellStatus(cell.id, cell.variant, cell.seed, state, seconds, seconds_left, message)
