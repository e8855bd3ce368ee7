"""A run's files as small dataclasses; what is missing, damaged or failed is a state of the record, not a crash."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

Status = Literal["done", "failed", "unfinished", "damaged"]


@dataclass(frozen=True)
class Variant:
    """One row of the ablation, as grid.json describes it."""

    name: str
    label: str
    mixer: str | None = None
    causality: str | None = None
    normalize: bool | None = None
    trained: bool | None = None
    options: Any = None
    select: Any = None
    min_tokens: int | None = None
    distillation: Any = None

    DESIGN: ClassVar = ("mixer", "causality", "normalize", "options", "select", "min_tokens", "distillation")

    @property
    def untouched(self) -> bool:
        """Whether this is the sanity row: the teacher's own softmax, mounted and not trained."""
        return self.mixer is None or self.trained is False


@dataclass(frozen=True)
class Fidelity:
    """Errors of one cell at one image size."""

    size: int
    error_to_teacher: float
    relative_error_to_teacher: float
    error_to_truth: float
    teacher_error_to_truth: float
    error_ratio: float


@dataclass(frozen=True)
class Speed:
    """Time, memory, operations and state of one forward pass."""

    size: int
    tokens: int
    seconds: float
    spread: float
    peak_bytes: int | None = None
    flops: int | None = None
    state_size: int | None = None


ROWS = {
    "sites": ("site", "height", "width", "relative_error"),
    "timesteps": ("timestep", "height", "width", "relative_error_to_teacher"),
    "images": ("metric", "features", "height", "width", "guidance", "student", "teacher"),
}
"""What rows of a result hold at least."""


@dataclass
class Cell:
    """One variant with one seed, in whatever state its folder is.

    Attributes:
        fidelity: of square pictures, by size.
        shapes: of other shapes, by (height, width).
        sites, timesteps, images: rows as the evaluation writes them; of older runs none.
    """

    id: str
    directory: Path
    variant: str
    seed: int | None
    status: Status
    error: str | None = None
    trained_parameters: int | None = None
    train_seconds: float | None = None
    steps: int | None = None
    fidelity: dict[int, Fidelity] = field(default_factory=dict)
    shapes: dict[tuple[int, int], Fidelity] = field(default_factory=dict)
    sites: list[dict[str, Any]] = field(default_factory=list)
    timesteps: list[dict[str, Any]] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    speed: list[Speed] = field(default_factory=list)
    config: dict[str, Any] | None = None
    metrics: list[dict[str, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def array(self, name: str) -> NDArray[np.float32] | None:
        """The mixing_matrix (l, l) or the receptive_field (h, w), or None where there is none to read."""
        path = self.directory / "arrays.safetensors"
        try:
            found = load_file(path).get(name) if path.is_file() else None
        except (OSError, ValueError, SafetensorError) as error:
            self.problems.append(f"arrays.safetensors cannot be read: {error}")
            return None
        return found if found is not None and found.ndim == 2 and found.size else None


@dataclass
class Run:
    """Everything the report knows."""

    directory: Path
    name: str
    question: str
    grid: dict[str, Any]
    variants: list[Variant]
    cells: list[Cell]
    left_out: list[str]
    frozen: dict[str, Any] = field(default_factory=dict)
    """protocol.json: what the evaluation's numbers depend on; of older runs empty."""

    @property
    def protocol(self) -> dict[str, Any]:
        """How cells were trained and measured, as far as it is recorded."""
        found = self.grid.get("protocol")
        asked = found if isinstance(found, dict) else {}
        return {k: v for k, v in asked.items() if k != "evaluation"} | self.frozen if self.frozen else asked

    @property
    def problems(self) -> list[str]:
        """What is wrong with the run's files, cell by cell."""
        return self.left_out + [f"{c.id}: {p}" for c in self.cells for p in c.problems if p != c.error]

    @property
    def train_size(self) -> int:
        """The only resolution seen in training."""
        return int(self.grid.get("train_size") or 64)

    @property
    def prompts(self) -> list[str]:
        """Prompts of the samples, in order."""
        return [str(p) for p in self.grid.get("prompts") or []]

    @property
    def sizes(self) -> list[int]:
        """Sizes measured in any finished cell, with those the grid asks for."""
        asked = {int(s) for s in self.grid.get("sizes") or []}
        return sorted(asked | {s for c in self.cells for s in c.fidelity})

    @property
    def sample_sizes(self) -> list[int]:
        """Sizes of the sample grids."""
        return sorted(int(s) for s in self.grid.get("sample_sizes") or [])

    @property
    def mixers(self) -> dict[str, str]:
        """What labels of each mixer's trained rows say before a comma, without a number; its name where they differ."""
        heads: dict[str, set[str]] = {}
        for variant in self.variants:
            if not variant.untouched:
                heads.setdefault(str(variant.mixer), set()).add(variant.label.split(",")[0].lstrip("0123456789. "))
        return {mixer: found.pop() if len(found) == 1 else mixer for mixer, found in heads.items()}

    @property
    def reference(self) -> Variant | None:
        """The row that others are compared with: the grid's, else the first trained, of those with a finished cell."""
        trained = [v for v in self.variants if not v.untouched]
        named = [v for v in trained if v.name == self.grid.get("reference")]
        return next((v for v in (*named, *(v for v in trained if self.done(v.name)), *trained)), None)

    def done(self, variant: str) -> list[Cell]:
        """Finished cells of a variant, by seed."""
        found = [c for c in self.cells if c.variant == variant and c.status == "done"]
        return sorted(found, key=lambda c: (c.seed is None, c.seed or 0))

    def missing(self) -> list[tuple[str, int]]:
        """(variant, seed) pairs the grid asks for and no folder exists of."""
        present = {(c.variant, c.seed) for c in self.cells}
        return [(v.name, s) for s in self.grid.get("seeds") or [] for v in self.variants if (v.name, s) not in present]


def load_run(directory: Path) -> Run:
    """Read a run's folder.

    Raises:
        ValueError: grid.json is missing or is not a JSON object; without it there is nothing to report on.
    """
    path = directory / "grid.json"
    try:
        grid = _checked(_object(path))
    except (OSError, ValueError) as error:
        why = f"{path} is not a readable grid ({error})"
        raise ValueError(f"Cannot build a report: {why}. Is this a run's folder?") from error
    fields = (*Variant.DESIGN, "trained")
    variants = [
        Variant(str(v["name"]), str(v.get("label") or v["name"]), **{k: v.get(k) for k in fields})
        for v in grid.get("variants") or []
        if isinstance(v, dict) and "name" in v
    ]
    folder = directory / "cells"
    folders = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    found = [load_cell(p) for p in folders]
    problems: list[str] = []
    cells = _current(found, grid, {v.name for v in variants}, problems)
    frozen: dict[str, Any] = {}
    try:
        frozen = _object(directory / "protocol.json")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        problems.append(f"protocol.json is damaged ({error})")
    name, question = str(grid.get("name") or directory.name), str(grid.get("question") or "")
    return Run(directory, name, question, grid, variants, cells, problems, frozen)


def _current(cells: list[Cell], grid: dict[str, Any], variants: set[str], problems: list[str]) -> list[Cell]:
    """Cells of the grid as it is now: a folder may still hold those of an earlier version of it."""
    protocol = grid.get("protocol")
    now = dict(protocol) if isinstance(protocol, dict) else {}
    now |= {k: grid[k] for k in ("teacher", "data") if k in grid}
    own = {v["name"]: v for v in grid.get("variants") or [] if isinstance(v, dict) and "name" in v}
    kept: dict[tuple[str, int | None], Cell] = {}
    for cell in sorted(cells, key=_age):
        config = cell.config or {}
        wanted = now | {k: v for k, v in own.get(cell.variant, {}).items() if k == "distillation" and v is not None}
        both = [k for k in ("teacher", "data", "distillation", "evaluation") if k in config and k in wanted]
        changed = [k for k in both if config[k] != wanted[k]]
        if cell.variant not in variants:
            problems.append(f"{cell.id}: left out, as grid.json has no variant {cell.variant!r}")
        elif grid.get("seeds") and cell.seed is not None and cell.seed not in grid["seeds"]:
            problems.append(f"{cell.id}: left out, as grid.json has no seed {cell.seed}")
        elif changed:
            problems.append(f"{cell.id}: left out, as its {' and '.join(changed)} differ from those in grid.json")
        else:
            key = (cell.variant, cell.seed) if cell.seed is not None else (cell.id, None)
            if key in kept:
                problems.append(f"{kept[key].id}: left out, as {cell.id} is a newer cell of the same variant and seed")
            kept[key] = cell
    return sorted(kept.values(), key=lambda c: c.id)


def _age(cell: Cell) -> tuple[float, str]:
    path = cell.directory / "result.json"
    return (path.stat().st_mtime if path.is_file() else 0.0, cell.id)


def load_cell(directory: Path) -> Cell:
    """Read one cell's folder, whatever state it is in."""
    cell = Cell(directory.name, directory, directory.name.split("-s")[0], None, "unfinished")
    try:
        cell.config = _object(directory / "config.json")
    except FileNotFoundError:
        cell.problems.append("config.json is missing")
    except (OSError, ValueError) as error:
        cell.problems.append(f"config.json is damaged ({error})")
    _from_config(cell)
    cell.metrics, bad = _lines(directory / "metrics.jsonl")
    if bad:
        cell.problems.append(f"metrics.jsonl: {bad} damaged line{'s' * (bad > 1)} skipped")
    try:
        _from_result(cell, _object(directory / "result.json"))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        cell.status, cell.error = "damaged", f"result.json is damaged: {type(error).__name__}: {error}"
        cell.fidelity, cell.shapes, cell.speed = {}, {}, []
        cell.problems.append(cell.error)
    return cell


def _from_config(cell: Cell) -> None:
    config = cell.config or {}
    variant = config.get("variant")
    name = variant.get("name") if isinstance(variant, dict) else variant
    if isinstance(name, str):
        cell.variant = name
    if isinstance(config.get("seed"), int):
        cell.seed = config["seed"]


def _from_result(cell: Cell, result: dict[str, Any]) -> None:
    cell.variant, cell.seed = str(result["variant"]), int(result["seed"])
    status = result["status"]
    if status not in ("done", "failed"):
        raise ValueError(f"unknown status {status!r}")
    cell.error = result.get("error")
    cell.trained_parameters = result.get("trained_parameters")
    cell.train_seconds = result.get("train_seconds")
    cell.steps = result.get("steps")
    for row in result.get("fidelity") or []:
        names = [n for n in Fidelity.__dataclass_fields__ if n != "size"]
        entry = Fidelity(int(row["size"]), **{n: _number(row[n]) for n in names})
        shape = (int(row.get("height", entry.size)), int(row.get("width", entry.size)))
        if shape[0] == shape[1]:
            cell.fidelity[entry.size] = entry
        else:
            cell.shapes[shape] = entry
    for row in result.get("speed") or []:
        counts = [None if row.get(n) is None else int(row[n]) for n in ("peak_bytes", "flops", "state_size")]
        times = float(row["seconds"]), float(row.get("spread") or 0)
        cell.speed.append(Speed(int(row["size"]), int(row["tokens"]), *times, *counts))
    for name, keys in ROWS.items():
        found = [dict(row) for row in result.get(name) or []]
        if missing := [key for row in found for key in keys if key not in row]:
            raise KeyError(f"a row of {name} has no {missing[0]}")
        setattr(cell, name, found)
    cell.status = status


def _checked(grid: dict[str, Any]) -> dict[str, Any]:
    """grid.json as it is, if its parts are what the report takes them for."""
    for key in ("sizes", "sample_sizes", "seeds"):
        if not all(isinstance(value, int) for value in _list(grid, key)):
            raise ValueError(f"{key} is no list of whole numbers")
    for key in ("variants", "prompts", "notes", "claims"):
        _list(grid, key)
    if not isinstance(grid.get("train_size") or 64, int):
        raise ValueError("train_size is no whole number")
    return grid


def _list(grid: dict[str, Any], key: str) -> list[Any]:
    value = grid.get(key) or []
    if not isinstance(value, list):
        raise ValueError(f"{key} is no list")
    return value


def _number(value: Any) -> float:
    """A float; null, as a writer may put for one that is not finite, is NaN."""
    return math.nan if value is None else float(value)


def _object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _lines(path: Path) -> tuple[list[dict[str, float]], int]:
    """Records of a JSON-lines file, the last of each step, and the number of damaged lines."""
    if not path.is_file():
        return [], 0
    found: dict[int, dict[str, float]] = {}
    bad = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found[int(row["step"])] = {k: float(v) for k, v in row.items() if isinstance(v, int | float)}
        except (ValueError, KeyError, TypeError):
            bad += 1
    return [found[k] for k in sorted(found)], bad
