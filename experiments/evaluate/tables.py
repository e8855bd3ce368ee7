"""An evaluation in a terminal: one table of errors, one of pictures over a sweep of guidances."""

from __future__ import annotations

from typing import Any

from rich.table import Table

Row = dict[str, Any]


def fidelity_table(rows: list[Row]) -> Table:
    """Errors to the teacher, and to the truth over the teacher's own, by size and shape."""
    table = Table("size", "error to teacher", "relative", "error to truth ÷ teacher's", title="Agreement")
    for row in rows:
        values = (row["error_to_teacher"], row["relative_error_to_teacher"], row["error_ratio"])
        table.add_row(f"{row['height']} × {row['width']}", *(f"{value:.4g}" for value in values))
    return table


def sweep_table(rows: list[Row]) -> Table:
    """A line a size, network and guidance; a column a metric: student / teacher (/ true pictures)."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    lines: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        place = (f"{row['height']} × {row['width']}", row["features"], f"{row['guidance']:g}")
        lines.setdefault(place, {})[row["metric"]] = row
    names = [f"{name.replace('_', ' ')}: student / teacher" for name in metrics]
    table = Table("size", "features", "guidance", *names, title=f"{rows[0]['images']} pictures")
    for place, found in lines.items():
        table.add_row(*place, *(_values(found.get(metric)) for metric in metrics))
    return table


def _values(row: Row | None) -> str:
    if row is None:
        return "–"
    told = f"{row['student']:.4g} / {row['teacher']:.4g}"
    return told if row["truth"] is None else f"{told} (true pictures {row['truth']:.4g})"
