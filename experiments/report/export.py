"""The numbers for other programs: CSV and Parquet of every cell, LaTeX of the main table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from experiments.report.records import Run, Variant
from experiments.report.tables import METRICS, Table, best_row, over_seeds

COLUMNS = (
    "kind",
    "variant",
    "label",
    "causality",
    "normalize",
    "seed",
    "seeds",
    "size",
    "height",
    "width",
    *METRICS,
    "best",
)
_LATEX = {"\\": r"\textbackslash{}", "×": r"$\times$", "÷": r"$\div$", "±": r"$\pm$", "–": "--", "▲": r"$\uparrow$"}
_LATEX |= {"▼": r"$\downarrow$", "→": r"$\to$", "^": r"\^{}", "~": r"\~{}", **{c: f"\\{c}" for c in "&%$#_{}"}}


def write_numbers(run: Run, table: Table, directory: Path) -> None:
    """Write results.csv, results.parquet and results.tex into `directory`."""
    rows = results(run)
    with (directory / "results.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: repr(v) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    kinds = {name: pyarrow.float64() for name in METRICS} | dict.fromkeys(
        ("seed", "seeds", "size", "height", "width"), pyarrow.int64()
    )
    kinds |= dict.fromkeys(("normalize", "best"), pyarrow.bool_())
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in COLUMNS])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), directory / "results.parquet")
    (directory / "results.tex").write_text(latex(table), encoding="utf-8")


def results(run: Run) -> list[dict[str, Any]]:
    """A row a cell and size, unrounded, and one a variant and size with the means over seeds.

    `size` is the side of a square, none at other aspect ratios.
    """
    rows = []
    for variant in run.variants:
        about = _about(variant)
        for cell in run.done(variant.name):
            squares = [((size, size), found) for size, found in sorted(cell.fidelity.items())]
            for (height, width), found in [*squares, *sorted(cell.shapes.items())]:
                extent = {"size": height if height == width else None, "height": height, "width": width}
                numbers = {m: getattr(found, m) for m in METRICS}
                rows.append({"kind": "cell", **about, "seed": cell.seed, "seeds": 1, **extent, **numbers})
    for size in run.sizes:
        values = [over_seeds(run, v, size, "relative_error_to_teacher") for v in run.variants]
        best = best_row(run, values)
        for place, (variant, value) in enumerate(zip(run.variants, values, strict=True)):
            if value is None:
                continue
            means = {m: over_seeds(run, variant, size, m) for m in METRICS}
            numbers = {m: None if v is None else v.mean for m, v in means.items()}
            extent = dict.fromkeys(("size", "height", "width"), size)
            rows.append({"kind": "mean", **_about(variant), "seeds": value.seeds, **extent, **numbers})
            rows[-1]["best"] = place == best
    return rows


def latex(table: Table) -> str:
    """The main table for a paper, with booktabs; the best of a column is bold."""
    lines = [r"\begin{tabular}{ll" + "r" * (len(table.columns) - 2) + "}", r"\toprule"]
    lines += [" & ".join(_escaped(c) for c in table.columns) + r" \\", r"\midrule"]
    for row in table.rows:
        texts = [_escaped(e.text) for e in row.entries]
        texts = [rf"\textbf{{{t}}}" if e.best else t for t, e in zip(texts, row.entries, strict=True)]
        lines.append(" & ".join([_escaped(row.label), *texts]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)


def _about(variant: Variant) -> dict[str, Any]:
    names = ("name", "label", "causality", "normalize")
    return dict(zip(("variant", *names[1:]), (getattr(variant, n) for n in names), strict=True))
