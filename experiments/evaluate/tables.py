"""Measurements in a terminal: one table for each metric, with columns from the registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from experiments.evaluate.measurements import Measurements
from experiments.metrics.base import Metric, MetricRow, list_metrics, metric_class

LONGEST = 40
"""Rows of a table; longer ones stay in the record."""


def measurement_tables(measurements: Measurements) -> list[Table]:
    """Return a table for every metric that has rows and is registered."""
    registered = set(list_metrics())
    return [
        _table(metric_class(name), rows) for name, rows in measurements.metrics.items() if rows and name in registered
    ]


def _table(metric: type[Metric], rows: Sequence[MetricRow]) -> Table:
    keys = metric.key_fields()
    arrows = {"lower": " ↓", "higher": " ↑", "neither": ""}
    heads = [f"{quantity.label}{arrows[quantity.better]}" for quantity in metric.quantities]
    table = Table(*(key.replace("_", " ") for key in keys), *heads, title=metric.title)
    for row in rows[:LONGEST]:
        values = [getattr(row, name) for name in (*keys, *(quantity.field for quantity in metric.quantities))]
        table.add_row(*map(_text, values))
    if len(rows) > LONGEST:
        table.caption = f"{LONGEST} of {len(rows)} rows; the others are in the record"
    return table


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
