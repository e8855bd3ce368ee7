"""One CSV of every cell ever measured, appended run by run, as timm collects its results."""

from __future__ import annotations

import csv
from pathlib import Path

from experiments.core.files import write_text
from experiments.report.run_files import CellRecord, RunRecord, load_run

IDENTITY = ("cell", "seed", "protocol", "commit")
FACTS = ("grid", "cell", "variant", "label", "mixer", "causality", "normalization", "seed")
FIDELITY = ("relative_error_to_teacher", "error_ratio")


def append_cells(directory: Path, table: Path) -> int:
    """Append the finished cells of a run that are not in the table yet; returns their number.

    A cell is identified by its id, seed and protocol, and by the commit of the code that measured it, which is empty if
    its record has none: a cell that is measured again after a fix is another row. Columns that the table does not have
    are added.

    Raises:
        ValueError: the folder is not a run's, or the file is no such table; it is left as it is.
        OSError: the table cannot be written.
    """
    run = load_run(directory)
    columns, rows = _read_table(table)
    present = {_identity(row) for row in rows}
    new_rows = [_row(run, cell) for cell in run.cells if cell.state == "done"]
    new_rows = [row for row in new_rows if _identity(row) not in present]
    names = list(dict.fromkeys([*columns, *FACTS, *(name for row in new_rows for name in row)]))
    lines = _LineBuffer()
    writer = csv.DictWriter(lines, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*rows, *new_rows])
    write_text(table, "".join(lines.parts))
    return len(new_rows)


def _identity(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row.get(name, "") for name in IDENTITY)


class _LineBuffer:
    """Collects what a CSV writer writes."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def write(self, text: str) -> int:
        self.parts.append(text)
        return len(text)


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    if not path.is_file():
        return [], []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = list(reader.fieldnames or [])
            rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"Cannot read {path} as a table of cells: {error}. Give another file with --table.") from error
    missing = [name for name in ("cell", "seed", "protocol") if name not in columns]
    uneven = next((number for number, row in enumerate(rows, 2) if None in row or None in row.values()), None)
    if columns and missing:
        raise ValueError(f"{path} is no table of cells: it has no column {missing[0]}. Give another file with --table.")
    if uneven is not None:
        raise ValueError(f"{path} is damaged: line {uneven} has another number of columns than the first.")
    return columns, rows


def _row(run: RunRecord, cell: CellRecord) -> dict[str, str]:
    variant = next(v for v in run.variants if v.name == cell.variant)
    result = cell.result
    assert result is not None and result.measurements is not None
    facts = {
        "grid": run.name,
        "cell": cell.id,
        "variant": variant.name,
        "label": variant.label,
        "mixer": variant.mixer,
        "causality": variant.causality,
        "normalization": variant.normalization,
        "seed": result.seed,
        "steps": result.steps,
        "train_seconds": round(result.train_seconds, 1),
        "seconds": round(result.seconds, 1),
        "protocol": result.measurements.protocol,
        "commit": result.measurements.commit,
        "device": run.description.environment.get("device", ""),
    }
    errors = {
        f"{name}, {row.height} × {row.width} px": repr(getattr(row, name))
        for rows in (cell.fidelity, cell.shapes)
        for row in rows.values()
        for name in FIDELITY
    }
    return {name: str(value) for name, value in facts.items()} | errors
