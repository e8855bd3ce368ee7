"""Numbers over seeds: the main table, as Markdown and as HTML cells, and the long CSV."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

from experiments.report.records import Cell, Run, Variant

METRICS = ("error_to_teacher", "relative_error_to_teacher", "error_to_truth", "teacher_error_to_truth", "error_ratio")
SPREAD = "mean ± half the range over seeds; no ± where there is one seed"


@dataclass(frozen=True)
class Value:
    """A mean over seeds with its spread, half of (largest − smallest)."""

    mean: float
    half_range: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        if self.mean == 0 and self.half_range == 0:
            return "0"
        if not math.isfinite(self.mean):
            return "not finite"
        return number(self.mean) + (f" ± {number(self.half_range)}" if self.seeds > 1 else "")


@dataclass(frozen=True)
class Row:
    """A variant's line in the main table: cells as text, and which of them are the best of their column."""

    variant: Variant
    cells: list[str]
    best: list[bool]


@dataclass(frozen=True)
class Table:
    """The main table."""

    columns: list[str]
    rows: list[Row]


def number(value: float) -> str:
    """Three significant digits, scientific only where it must be."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "not finite"
    if not 1e-4 <= abs(value) < 1e4:
        return f"{value:.2e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def summarise(values: list[float]) -> Value | None:
    """Mean and half range; None of nothing."""
    if not values:
        return None
    if not all(math.isfinite(v) for v in values):
        return Value(math.nan, math.nan, math.nan, math.nan, len(values))
    low, high = min(values), max(values)
    return Value(math.fsum(values) / len(values), (high - low) / 2, low, high, len(values))


def over_seeds(run: Run, variant: Variant, size: int, metric: str) -> Value | None:
    """A fidelity metric of a variant at a size."""
    return summarise([getattr(c.fidelity[size], metric) for c in run.done(variant.name) if size in c.fidelity])


def main_table(run: Run) -> Table:
    """Relative error to the teacher and error ratio at each size; the untouched softmax cannot be the best."""
    keys = [(size, m) for m in ("relative_error_to_teacher", "error_ratio") for size in run.sizes]
    heads = {"relative_error_to_teacher": "Error to teacher", "error_ratio": "Error ratio to truth"}
    values = {v.name: [over_seeds(run, v, size, m) for size, m in keys] for v in run.variants}
    marked = [_best(run, [values[v.name][k] for v in run.variants]) for k in range(len(keys))]
    rows = []
    for place, variant in enumerate(run.variants):
        done = run.done(variant.name)
        cells = [_feature(variant), str(len(done)), _parameters(done)]
        best = [False] * 3 + [place == b for b in marked]
        rows.append(Row(variant, cells + ["–" if x is None else str(x) for x in values[variant.name]], best))
    columns = ["Variant", "Features", "Seeds", "Trained parameters", *(f"{heads[m]}, {size} px" for size, m in keys)]
    return Table(columns, rows)


def markdown(table: Table) -> str:
    """The table in Markdown; the best of a column is bold."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    for row in table.rows:
        cells = [f"**{c}**" if b else c for c, b in zip(row.cells, row.best, strict=True)]
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in [row.variant.label, *cells]) + " |")
    return "\n".join(lines) + "\n"


def results_csv(run: Run) -> str:
    """One line per cell and size, unrounded, and one per variant and size with the means over seeds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["kind", "variant", "label", "causality", "normalize", "seed", "seeds", "size", *METRICS, "best"])
    for variant in run.variants:
        about = _about(variant)
        for cell in run.done(variant.name):
            for size, row in sorted(cell.fidelity.items()):
                writer.writerow(["cell", *about, cell.seed, 1, size, *(repr(getattr(row, m)) for m in METRICS), ""])
    for size in run.sizes:
        values = [over_seeds(run, v, size, "relative_error_to_teacher") for v in run.variants]
        best = _best(run, values)
        for place, (variant, value) in enumerate(zip(run.variants, values, strict=True)):
            if value is None:
                continue
            means = [over_seeds(run, variant, size, m) for m in METRICS]
            numbers = ["" if m is None else repr(m.mean) for m in means]
            writer.writerow(
                ["mean", *_about(variant), "", value.seeds, size, *numbers, "best" if place == best else ""]
            )
    return out.getvalue()


def write_tables(run: Run, directory: Path) -> Table:
    """Write results.csv into `directory`; returns the main table."""
    (directory / "results.csv").write_text(results_csv(run), encoding="utf-8")
    return main_table(run)


def _about(variant: Variant) -> list[str]:
    normalize = "" if variant.normalize is None else str(variant.normalize)
    return [variant.name, variant.label, variant.causality or "", normalize]


def _best(run: Run, values: list[Value | None]) -> int | None:
    """Place of the smallest mean among the trained variants."""
    pairs = zip(run.variants, values, strict=True)
    found = [(x.mean, k) for k, (v, x) in enumerate(pairs) if x and not v.untouched and math.isfinite(x.mean)]
    return min(found)[1] if found else None


def _feature(variant: Variant) -> str:
    if variant.untouched:
        return "the teacher's own"
    normal = {True: "normalised", False: "unnormalised", None: "default normalisation"}[variant.normalize]
    return f"{(variant.causality or 'default order').replace('noncausal', 'non-causal')}, {normal}"


def _parameters(done: list[Cell]) -> str:
    counts = {c.trained_parameters for c in done if c.trained_parameters is not None}
    return " / ".join(f"{n:,}" for n in sorted(counts)) or "–"
