"""A run's files as typed records; what is missing, damaged or failed is a state of the record, not an error."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from experiments.ablation.description import FILE, RunDescription, VariantDescription
from experiments.ablation.result import RESULT, CellResult
from experiments.config import DistillationConfig
from experiments.core.files import parse_json_object
from experiments.evaluate.protocol import FILE as PROTOCOL
from experiments.metrics import MetricRow, list_metrics
from experiments.metrics.fidelity import FidelityRow

CellState = Literal["done", "failed", "unfinished", "damaged"]
_Row = TypeVar("_Row", bound=MetricRow)
DESIGN_FIELDS: tuple[str, ...] = (
    "mixer",
    "causality",
    "normalization",
    "feature_map",
    "other_options",
    "select",
    "min_tokens",
    "distillation",
)
"""What makes a row a design of its own, beside its name and label."""


@dataclass
class CellRecord:
    """One variant with one seed, in whatever state its folder is.

    Attributes:
        id, directory, variant, seed, state: of the cell.
        error: why it failed or is damaged.
        result: what it recorded; None unless it is done or failed.
        config: config.json.
        log: one record for each logged training step.
        problems: what is wrong with its files.
    """

    id: str
    directory: Path
    variant: str
    seed: int | None
    state: CellState = "unfinished"
    error: str | None = None
    result: CellResult | None = None
    config: dict[str, Any] | None = None
    log: list[dict[str, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def rows(self, metric: str, row_type: type[_Row]) -> tuple[_Row, ...]:
        """Return the rows of a metric; none if it was not measured."""
        if self.result is None or self.result.measurements is None:
            return ()
        return self.result.measurements.rows(metric, row_type)

    @cached_property
    def fidelity(self) -> dict[int, FidelityRow]:
        """Errors on square held-out images, by size."""
        rows = self.rows("fidelity", FidelityRow)
        return {row.size: row for row in rows if row.height == row.width and row.split == "held_out"}

    @cached_property
    def held_in(self) -> dict[int, FidelityRow]:
        """Errors on square held-in images, by size."""
        rows = self.rows("fidelity", FidelityRow)
        return {row.size: row for row in rows if row.height == row.width and row.split == "held_in"}

    @cached_property
    def shapes(self) -> dict[tuple[int, int], FidelityRow]:
        """Errors on other held-out images, by (height, width)."""
        rows = self.rows("fidelity", FidelityRow)
        return {(r.height, r.width): r for r in rows if r.height != r.width and r.split == "held_out"}

    def array(self, name: str) -> NDArray[np.float32] | None:
        """Return the mixing_matrix (l, l) or the receptive_field (h, w), or None if it is missing or damaged."""
        path = self.directory / "arrays.safetensors"
        try:
            array = load_file(path).get(name) if path.is_file() else None
        except (OSError, ValueError, SafetensorError) as error:
            self.problems.append(f"arrays.safetensors cannot be read: {error}")
            return None
        return array if array is not None and array.ndim == 2 and array.size else None


@dataclass
class RunRecord:
    """Everything the report knows.

    Attributes:
        directory: of the run.
        description: grid.json.
        cells: those of the grid as it is now.
        omitted: why cells in the folder are not among them, and other problems of the run's files.
        frozen: protocol.json, which the evaluation's numbers depend on; empty if it is missing.
    """

    directory: Path
    description: RunDescription
    cells: list[CellRecord]
    omitted: list[str] = field(default_factory=list)
    frozen: dict[str, Any] = field(default_factory=dict)

    UNNAMED: ClassVar[str] = "an unnamed run"

    @property
    def name(self) -> str:
        """The grid's name."""
        return self.description.name or self.UNNAMED

    @property
    def variants(self) -> tuple[VariantDescription, ...]:
        """Rows of the ablation, in the grid's order."""
        return self.description.variants

    @property
    def trained(self) -> list[VariantDescription]:
        """All rows but the untouched softmax."""
        return [variant for variant in self.variants if not variant.untouched]

    @property
    def train_size(self) -> int:
        """Side of the training images in pixels."""
        return self.description.train_size

    @property
    def train_sizes(self) -> tuple[int, ...]:
        """Sides in pixels of all images that students are distilled on, increasing."""
        try:
            plan = DistillationConfig.model_validate(self.description.protocol.get("distillation"))
        except ValidationError:
            return (self.train_size,)
        return tuple(sorted({self.train_size, *plan.all_sizes}))

    @property
    def train_sizes_text(self) -> str:
        """The same for readers, as "64 and 128 px"."""
        *first, last = map(str, self.train_sizes)
        return f"{', '.join(first)} and {last} px" if first else f"{last} px"

    @property
    def protocol(self) -> dict[str, Any]:
        """How cells were trained and measured, as far as it is recorded."""
        configured = self.description.protocol
        return {k: v for k, v in configured.items() if k != "evaluation"} | self.frozen if self.frozen else configured

    @property
    def problems(self) -> list[str]:
        """What is wrong with the run's files, cell by cell."""
        return self.omitted + [f"{c.id}: {p}" for c in self.cells for p in c.problems if p != c.error]

    @property
    def sizes(self) -> list[int]:
        """Sizes measured in any finished cell, with those the grid names."""
        return sorted(set(self.description.sizes) | {size for cell in self.cells for size in cell.fidelity})

    @property
    def mixer_labels(self) -> dict[str, str]:
        """What the labels of each mixer's rows say before a comma, without a number; its name if they differ."""
        heads: dict[str, set[str]] = {}
        for variant in self.trained:
            heads.setdefault(variant.mixer, set()).add(variant.label.split(",")[0].lstrip("0123456789. "))
        return {mixer: labels.pop() if len(labels) == 1 else mixer for mixer, labels in heads.items()}

    @property
    def reference(self) -> VariantDescription | None:
        """The row that others are compared with: the grid's, or the first mixer with a finished cell; no control."""
        mixers = [variant for variant in self.trained if variant.control is None]
        named = [variant for variant in mixers if variant.name == self.description.reference]
        finished = [variant for variant in mixers if self.done(variant.name)]
        return next(iter((*named, *finished, *mixers)), None)

    def done(self, variant: str) -> list[CellRecord]:
        """Return the finished cells of a variant, by seed."""
        cells = [cell for cell in self.cells if cell.variant == variant and cell.state == "done"]
        return sorted(cells, key=lambda cell: (cell.seed is None, cell.seed or 0))

    def missing(self) -> list[tuple[str, int]]:
        """Return the (variant, seed) pairs of the grid that have no folder."""
        present = {(cell.variant, cell.seed) for cell in self.cells}
        pairs = [(v.name, seed) for seed in self.description.seeds for v in self.variants]
        return [pair for pair in pairs if pair not in present]

    def unregistered_metrics(self) -> list[str]:
        """Return the names of recorded metrics that are not registered, as of a plug-in that is not loaded."""
        results = [cell.result for cell in self.cells]
        recorded = {n for result in results if result and result.measurements for n in result.measurements.metrics}
        return sorted(recorded - set(list_metrics()))


def load_run(directory: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        ValueError: grid.json is missing or damaged; without it there is nothing to report on.
    """
    path = directory / FILE
    try:
        description = RunDescription.model_validate(parse_json_object(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ValueError(f"Cannot build a report: {path} is not a readable grid ({reason}).") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Cannot build a report: {path} is not a readable grid ({error}). Expected the folder of a run."
        ) from error
    folder = directory / "cells"
    folders = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    problems: list[str] = []
    cells = _current_cells([load_cell(p) for p in folders], description, problems)
    frozen: dict[str, Any] = {}
    try:
        frozen = parse_json_object((directory / PROTOCOL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        problems.append(f"protocol.json is damaged ({error})")
    run = RunRecord(directory, description, cells, problems, frozen)
    problems += [
        f"rows of the metric {name!r} are not reported, as it is not registered: load it with --plugin"
        for name in run.unregistered_metrics()
    ]
    return run


def load_cell(directory: Path) -> CellRecord:
    """Read one cell's folder, whatever state it is in."""
    cell = CellRecord(directory.name, directory, directory.name.split("-s")[0], None)
    try:
        cell.config = parse_json_object((directory / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        cell.problems.append("config.json is missing")
    except (OSError, ValueError) as error:
        cell.problems.append(f"config.json is damaged ({error})")
    _name_from_config(cell)
    cell.log, damaged = _read_log(directory / "metrics.jsonl")
    if damaged:
        cell.problems.append(f"metrics.jsonl: {damaged} damaged line{'s' * (damaged > 1)} skipped")
    try:
        cell.result = CellResult.model_validate(parse_json_object((directory / RESULT).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return cell
    except (OSError, ValueError) as error:
        cell.state = "damaged"
        cell.error = f"result.json is damaged: {_summarize(error)}"
        cell.problems.append(cell.error)
        return cell
    cell.variant = cell.result.variant
    cell.seed = cell.result.seed
    cell.state = cell.result.status
    cell.error = cell.result.error
    return cell


def _current_cells(cells: list[CellRecord], grid: RunDescription, problems: list[str]) -> list[CellRecord]:
    """Cells of the grid as it is now; a folder may still hold those of an earlier version of it.

    A cell's id is the hash of its configuration. If grid.json lists no ids, the recorded parts are compared.
    """
    variants = {variant.name: variant for variant in grid.variants}
    ids = {cell.id for cell in grid.cells}
    current: dict[tuple[str, int | None], CellRecord] = {}
    for cell in sorted(cells, key=_age):
        if cell.variant not in variants:
            problems.append(f"{cell.id}: left out, as grid.json has no variant {cell.variant!r}")
        elif grid.seeds and cell.seed is not None and cell.seed not in grid.seeds:
            problems.append(f"{cell.id}: left out, as grid.json has no seed {cell.seed}")
        elif cell.id in ids:
            current[cell.variant, cell.seed] = cell
        elif changed := _changed_parts(cell.config or {}, grid, variants[cell.variant]):
            problems.append(f"{cell.id}: left out, as its {' and '.join(changed)} differ from those in grid.json")
        elif ids:
            problems.append(f"{cell.id}: left out, as grid.json lists no such cell: its configuration is another")
        else:
            key = (cell.variant, cell.seed) if cell.seed is not None else (cell.id, None)
            if key in current:
                older = current[key]
                problems.append(f"{older.id}: left out, as {cell.id} is a newer cell of the same variant and seed")
            current[key] = cell
    return sorted(current.values(), key=lambda cell: cell.id)


def _changed_parts(config: dict[str, Any], grid: RunDescription, variant: VariantDescription) -> list[str]:
    """The parts of a cell's configuration that grid.json records differently."""
    now = {
        **grid.protocol,
        "teacher": grid.teacher,
        "teacher_variant": grid.teacher_variant,
        "data": grid.data,
    }
    if variant.distillation is not None:
        now["distillation"] = variant.distillation.model_dump(mode="json")
        config = {**config, "distillation": _complete_distillation(config.get("distillation"))}
    parts = ("teacher", "teacher_variant", "data", "distillation", "evaluation")
    return [part for part in parts if part in config and part in now and config[part] != now[part]]


def _complete_distillation(value: Any) -> Any:
    """A recorded distillation with the defaults of settings that are newer than it; as it is if it is not valid."""
    try:
        return DistillationConfig.model_validate(value).model_dump(mode="json")
    except ValidationError:
        return value


def _age(cell: CellRecord) -> tuple[float, str]:
    path = cell.directory / RESULT
    return (path.stat().st_mtime if path.is_file() else 0.0, cell.id)


def _name_from_config(cell: CellRecord) -> None:
    config = cell.config or {}
    variant = config.get("variant")
    name = variant.get("name") if isinstance(variant, dict) else variant
    if isinstance(name, str):
        cell.variant = name
    if isinstance(config.get("seed"), int):
        cell.seed = config["seed"]


def _summarize(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{type(error).__name__}: {error}"


def _read_log(path: Path) -> tuple[list[dict[str, float]], int]:
    """Records of a JSON-lines file, the last of each step, and the number of damaged lines."""
    if not path.is_file():
        return [], 0
    records: dict[int, dict[str, float]] = {}
    damaged = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            row = parse_json_object(line)
            records[int(row["step"])] = {k: float(v) for k, v in row.items() if isinstance(v, int | float)}
        except (ValueError, KeyError, TypeError, OverflowError):
            damaged += 1
    return [records[step] for step in sorted(records)], damaged
