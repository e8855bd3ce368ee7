"""The numbers for other programs: CSV and Parquet of every cell and metric, LaTeX of the main table."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from experiments.ablation.description import VariantDescription
from experiments.metrics import Metric, MetricRow
from experiments.report.errors import METRIC
from experiments.report.run_files import RunRecord
from experiments.report.sections import reported_metrics
from experiments.report.tables import ReportTable, best_row, summarize_fidelity

IDENTITY = ("kind", "variant", "label", "causality", "normalization", "seed", "seeds", "metric")
_LATEX = {"\\": r"\textbackslash{}", "×": r"$\times$", "÷": r"$\div$", "±": r"$\pm$", "–": "--", "▲": r"$\uparrow$"}
_LATEX |= {"▼": r"$\downarrow$", "→": r"$\to$", "^": r"\^{}", "~": r"\~{}", **{c: f"\\{c}" for c in "&%$#_{}"}}


def write_numbers(run: RunRecord, table: ReportTable, directory: Path) -> None:
    """Write results.csv, results.parquet and results.tex into `directory`."""
    rows = list(result_rows(run))
    columns = result_columns()
    with (directory / "results.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: repr(v) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    schema = pyarrow.schema([(name, _arrow_type(name, rows)) for name in columns])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), directory / "results.parquet")
    (directory / "results.tex").write_text(latex(table), encoding="utf-8")


def result_columns() -> list[str]:
    """Return the columns: what a row is of, then the fields of all registered metrics' rows, then the best mark."""
    fields = [field for metric in reported_metrics() for field in _fields(metric)]
    return list(dict.fromkeys([*IDENTITY, *fields, "best"]))


def result_rows(run: RunRecord) -> Iterator[dict[str, Any]]:
    """Iterate over all numbers: a row for each row of each metric of each cell, unrounded, and means of fidelity.

    Means over seeds are of square held-out images.
    """
    for variant in run.variants:
        for cell in run.done(variant.name):
            about = {"kind": "cell", **_about(variant), "seed": cell.seed, "seeds": 1}
            for metric in reported_metrics():
                for row in cell.rows(metric.name, metric.row):
                    yield {**about, "metric": metric.name, **_values(metric, row)}
    quantities = ("error_to_teacher", METRIC, "error_to_truth", "teacher_error_to_truth", "error_ratio")
    for size in run.sizes:
        best = best_row(run, [summarize_fidelity(run, v, size, METRIC) for v in run.variants])
        for position, variant in enumerate(run.variants):
            values = {q: summarize_fidelity(run, variant, size, q) for q in quantities}
            main = values[METRIC]
            if main is None:
                continue
            yield {
                "kind": "mean",
                **_about(variant),
                "seeds": main.seeds,
                "metric": "fidelity",
                "size": size,
                "height": size,
                "width": size,
                "split": "held_out",
                **{q: None if value is None else value.mean for q, value in values.items()},
                "best": position == best,
            }


def latex(table: ReportTable) -> str:
    """Return the main table for a paper, with booktabs; the best of a column is bold."""
    lines = [r"\begin{tabular}{ll" + "r" * (len(table.columns) - 2) + "}", r"\toprule"]
    lines += [" & ".join(_escape(column) for column in table.columns) + r" \\", r"\midrule"]
    for row in table.rows:
        texts = [_escape(cell.text) for cell in row.cells]
        cells = [rf"\textbf{{{text}}}" if cell.best else text for text, cell in zip(texts, row.cells, strict=True)]
        lines.append(" & ".join([_escape(row.label), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escape(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _about(variant: VariantDescription) -> dict[str, Any]:
    fields = ("label", "causality", "normalization")
    return {"variant": variant.name, **{field: getattr(variant, field) for field in fields}}


def _fields(metric: type[Metric]) -> list[str]:
    """Fields with single values; those with one per image stay in the cells' records."""
    return [*metric.key_fields(), *(quantity.field for quantity in metric.quantities)]


def _values(metric: type[Metric], row: MetricRow) -> dict[str, Any]:
    return {field: getattr(row, field) for field in _fields(metric)}


def _arrow_type(name: str, rows: list[dict[str, Any]]) -> pyarrow.DataType:
    kinds = {type(row[name]) for row in rows if row.get(name) is not None}
    if kinds == {bool}:
        return pyarrow.bool_()
    if kinds == {int}:
        return pyarrow.int64()
    return pyarrow.float64() if kinds and kinds <= {int, float} else pyarrow.string()
