"""A cell's record: written by the cell, last and atomically, and read by the report."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from experiments.config import CellConfig, FrozenModel
from experiments.core.files import read_json, write_json
from experiments.evaluate.measurements import Measurements

RESULT = "result.json"


class CellResult(FrozenModel):
    """One variant with one seed, completed or failed.

    Attributes:
        cell: id of the cell.
        variant, seed: what it is.
        status: "done", or "failed" with its error.
        error: type and message.
        trained_parameters: numbers that training could change.
        train_seconds: of training, those before an interruption included.
        seconds: of the whole cell in the process that completed it.
        steps: training steps of all stages.
        training_key: SHA-256 of everything that the weights depend on, beside the configuration.
        measurements: of the evaluation; None if it failed.
    """

    cell: str
    variant: str
    seed: int
    status: Literal["done", "failed"]
    error: str | None = None
    trained_parameters: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    training_key: str = ""
    measurements: Measurements | None = None

    @classmethod
    def failure(cls, config: CellConfig, error: BaseException) -> CellResult:
        """Return the record of a cell that raised an error."""
        message = f"{type(error).__name__}: {error}"
        return cls(cell=config.id, variant=config.variant.name, seed=config.seed, status="failed", error=message)


def write_result(directory: Path, result: CellResult) -> None:
    """Write a cell's record atomically; its presence means that the cell is completed."""
    write_json(directory / RESULT, result.model_dump(mode="python"))


def read_result(directory: Path) -> CellResult | None:
    """Read a cell's record; None if it is missing or damaged, so that the cell runs again."""
    try:
        return CellResult.model_validate(read_json(directory / RESULT))
    except ValidationError:
        return None


def is_done(directory: Path, training_key: str | None = None) -> bool:
    """Whether a cell is completed without an error, and its weights belong to the key if one is given."""
    result = read_result(directory)
    if result is None or result.status != "done":
        return False
    return training_key is None or result.training_key == training_key


def is_settled(directory: Path, since: float, training_key: str | None = None) -> bool:
    """Whether a cell is done, or failed after `since`, in seconds since the epoch."""
    path = directory / RESULT
    if is_done(directory, training_key):
        return True
    result = read_result(directory)
    return result is not None and result.status == "failed" and path.stat().st_mtime >= since
