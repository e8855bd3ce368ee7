"""Tables of registered metrics: a row for each variant, columns from the metric's own declaration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from experiments.metrics import Metric, MetricRow, ValueTable
from experiments.report.run_files import RunRecord
from experiments.report.tables import ReportTable, SeedSummary, TableCell, TableRow, best_row, summarize

_Key = tuple[tuple[str, Any], ...]


def metric_table(run: RunRecord, metric: type[Metric], spec: ValueTable) -> ReportTable:
    """Return the table that a metric declares; no rows if it was not measured."""
    measured = {
        v.name: [row for c in run.done(v.name) for row in c.rows(metric.name, metric.row)] for v in run.variants
    }
    keys = list(dict.fromkeys(_key(metric, row) for rows in measured.values() for row in rows))
    quantities = spec.quantities or tuple(quantity.field for quantity in metric.quantities)
    columns = [(quantity, key) for quantity in quantities for key in keys]
    values = {
        name: [_summary(metric, rows, quantity, key) for quantity, key in columns] for name, rows in measured.items()
    }
    best = [
        best_row(run, [values[v.name][k] for v in run.variants], metric.quantity(quantity).better == "higher")
        if metric.quantity(quantity).better != "neither"
        else None
        for k, (quantity, _) in enumerate(columns)
    ]
    rows = list(_baselines(metric, spec, measured, columns))
    for position, variant in enumerate(run.variants):
        cells = [TableCell.of_summary(x, position == b) for x, b in zip(values[variant.name], best, strict=True)]
        rows.append(TableRow(variant.label, cells))
    heads = [", ".join([metric.quantity(quantity).label, *_describe(key)]) for quantity, key in columns]
    return ReportTable(["Variant", *heads], rows if columns else [])


def _baselines(
    metric: type[Metric], spec: ValueTable, measured: dict[str, list[MetricRow]], columns: list[tuple[str, _Key]]
) -> Iterator[TableRow]:
    """Rows of what the metric is compared with, which is the same for all variants."""
    rows = [row for variant_rows in measured.values() for row in variant_rows]
    for label, field in spec.baselines if columns else ():
        yield TableRow(
            label,
            [TableCell.of_summary(summarize(sorted(set(_values(metric, rows, field, key))))) for _, key in columns],
        )


def _summary(metric: type[Metric], rows: list[MetricRow], field: str, key: _Key) -> SeedSummary | None:
    return summarize(_values(metric, rows, field, key))


def _values(metric: type[Metric], rows: list[MetricRow], field: str, key: _Key) -> list[float]:
    values = [getattr(row, field) for row in rows if _key(metric, row) == key]
    return [float(value) for value in values if value is not None]


def _key(metric: type[Metric], row: MetricRow) -> _Key:
    return tuple((field, getattr(row, field)) for field in metric.key_fields())


def _describe(key: _Key) -> Iterator[str]:
    """What a column is of, in words: "embedded CLIP", "64 px", "guidance 3"."""
    fields = dict(key)
    height = fields.pop("height", None)
    width = fields.pop("width", height)
    for name, value in fields.items():
        if name == "size":
            yield f"{value} px"
        elif name != "images":
            yield str(value) if isinstance(value, str) else f"{name.replace('_', ' ')} {value:g}"
    if height is not None:
        yield f"{height} px" if height == width else f"{width} × {height} px"
