"""Two runs side by side: the rows that both have, paired by seed and image."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import rich.markup
import rich.table

from experiments.ablation.description import VariantDescription
from experiments.core.files import parse_json_object, write_text
from experiments.core.statistics import Interval, holm, interval_over_seeds, log_ratios
from experiments.evaluate.protocol import FILE, differences
from experiments.report.effects import SIGNIFICANCE
from experiments.report.errors import errors_by_seed
from experiments.report.formatting import format_number
from experiments.report.html import render
from experiments.report.run_files import DESIGN_FIELDS, RunRecord, load_run
from experiments.report.tables import ReportTable, TableCell, TableRow, markdown


@dataclass(frozen=True)
class ErrorChange:
    """A row's error at a size in the second run over that in the first, seed by seed and image by image.

    Attributes:
        label, size: of the row.
        first, second: mean errors.
        ratio: second over first.
        adjusted_p: p-value after Holm's correction for all changes of the comparison.
    """

    label: str
    size: int
    first: float
    second: float
    ratio: Interval
    adjusted_p: float = math.nan

    @property
    def significant(self) -> bool:
        """Whether the change is distinguishable from noise."""
        return self.adjusted_p < SIGNIFICANCE


@dataclass(frozen=True)
class Comparison:
    """What two runs, named after their folders, share, and what only one of them has.

    Attributes:
        names: of the runs.
        changes: of the shared rows.
        unshared: labels of the rows that only one run has, for each run.
        redefined: sentences about rows of one name that are not the same in both.
    """

    names: tuple[str, str]
    changes: list[ErrorChange]
    unshared: tuple[list[str], list[str]]
    redefined: list[str]

    @property
    def notes(self) -> list[str]:
        """Sentences about what cannot be compared."""
        pairs = zip(self.names, self.unshared, strict=True)
        return [*self.redefined, *(f"Only in {name}: {', '.join(rows)}." for name, rows in pairs if rows)]


def compare_runs(first: Path, second: Path) -> Comparison:
    """Compare the errors to the teacher of two runs of one protocol.

    Raises:
        ValueError: a folder is not a run's; the runs were measured by different protocols, whose differences are named;
            or they share no finished row and seed.
    """
    runs = (load_run(first), load_run(second))
    _check_protocols(first, second)
    old = {variant.name: variant for variant in runs[0].variants}
    new = {variant.name: variant for variant in runs[1].variants}
    shared = [(variant, new[name]) for name, variant in old.items() if name in new]
    changes = [change for before, after in shared for change in _changes(*runs, before, after)]
    if not changes:
        raise ValueError(
            f"Nothing to compare: {first} and {second} share no variant with a finished cell of the same seed."
        )
    adjusted = holm([change.ratio.p_value for change in changes])
    changes = [replace(change, adjusted_p=p) for change, p in zip(changes, adjusted, strict=True)]
    names = (first.resolve().name, second.resolve().name)
    return Comparison(
        names=names if names[0] != names[1] else (str(first), str(second)),
        changes=changes,
        unshared=(
            [v.label for name, v in old.items() if name not in new],
            [v.label for name, v in new.items() if name not in old],
        ),
        redefined=[sentence for before, after in shared for sentence in _redefined(*runs, before, after)],
    )


def comparison_table(comparison: Comparison) -> ReportTable:
    """Return a row for each variant and size."""
    first, second = comparison.names
    rows = []
    for change in comparison.changes:
        mark = ("▲ " if change.ratio.mean > 1 else "▼ ") if change.significant else ""
        cells = [
            TableCell(f"{change.size} px", change.size),
            TableCell(format_number(change.first), change.first),
            TableCell(format_number(change.second), change.second),
            TableCell.of_interval(change.ratio, mark),
            TableCell(str(change.ratio.count), change.ratio.count),
        ]
        rows.append(TableRow(change.label, cells))
    return ReportTable(["Variant", "Size", first, second, f"{second} ÷ {first}", "Seeds"], rows)


def terminal_table(comparison: Comparison) -> rich.table.Table:
    """Return the same table for a terminal."""
    table = comparison_table(comparison)
    columns = [rich.markup.escape(column) for column in table.columns]
    terminal = rich.table.Table(*columns, title="Error to the teacher")
    for row in table.rows:
        terminal.add_row(*(rich.markup.escape(text) for text in (row.label, *(cell.text for cell in row.cells))))
    return terminal


def summarize_comparison(comparison: Comparison) -> str:
    """Say how many rows changed beyond noise, and which one most."""
    first, second = comparison.names
    significant = [change for change in comparison.changes if change.significant]
    higher = sum(change.ratio.mean > 1 for change in significant)
    summary = (
        f"Of {len(comparison.changes)} rows and sizes, {len(significant) - higher} have a lower error to the teacher "
        f"in {second} than in {first} beyond noise, and {higher} a higher one."
    )
    if significant:
        most = max(significant, key=lambda change: abs(math.log(change.ratio.mean)) if change.ratio.mean > 0 else 0)
        summary += f" The largest change: {most.label} at {most.size} px, {TableCell.of_interval(most.ratio).text}."
    seeds = min(change.ratio.count for change in comparison.changes)
    if seeds == 1:
        summary += " Some rows share a single seed, which gives no interval."
    elif seeds == 2:
        summary += " Some rows share only 2 seeds, whose intervals are wide."
    return summary


NOTE = (
    "Error to the teacher, relative to its mean square, as a mean over the seeds that both runs have; the ratio is a "
    "geometric mean over seeds and images with its 95 % t interval; ▼ lower and ▲ higher if p < 0.05 after Holm's "
    "correction for the number of comparisons."
)


def as_markdown(comparison: Comparison) -> str:
    """Return the comparison in Markdown."""
    title = f"# {comparison.names[1]} against {comparison.names[0]}"
    table = markdown(comparison_table(comparison)).strip()
    return "\n\n".join([title, summarize_comparison(comparison), NOTE, table, *comparison.notes]) + "\n"


def as_html(comparison: Comparison) -> str:
    """Return a self-contained page that sorts and filters."""
    return render(
        "compare.html.j2",
        title=f"{comparison.names[1]} against {comparison.names[0]}",
        table=comparison_table(comparison),
        summary=summarize_comparison(comparison),
        note=NOTE,
        notes=comparison.notes,
    )


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page as HTML or Markdown, by the suffix of the file's name.

    Raises:
        ValueError: another suffix.
    """
    writers = {".html": as_html, ".md": as_markdown}
    if path.suffix not in writers:
        raise ValueError(f"Cannot write {path}: expected a name that ends in .html or .md, got {path.suffix!r}.")
    write_text(path, writers[path.suffix](comparison))


def _changes(
    one: RunRecord, two: RunRecord, before: VariantDescription, after: VariantDescription
) -> list[ErrorChange]:
    changes: list[ErrorChange] = []
    for size in sorted(set(one.sizes) & set(two.sizes)):
        first = errors_by_seed(one, before, size)
        second = errors_by_seed(two, after, size)
        logs = log_ratios(second, first)
        if logs and not before.untouched:
            means = [sum(errors[seed].mean() for seed in logs) / len(logs) for errors in (first, second)]
            changes.append(ErrorChange(before.label, size, means[0], means[1], interval_over_seeds(logs).exp()))
    return changes


def _redefined(one: RunRecord, two: RunRecord, before: VariantDescription, after: VariantDescription) -> list[str]:
    """What two rows of one name differ in, themselves or in how they were distilled."""
    designs = []
    for run, variant in ((one, before), (two, after)):
        design = {field: getattr(variant, field) for field in DESIGN_FIELDS if field != "distillation"}
        own = variant.distillation.model_dump(mode="json") if variant.distillation else None
        designs.append({**design, "distillation": own or run.description.protocol.get("distillation")})
    if before.untouched or designs[0] == designs[1]:
        return []
    clauses = differences(*designs)
    more = f"; and {len(clauses) - 3} more" if len(clauses) > 3 else ""
    return [f"“{before.label}” is not the same in both: from the first to the second, {'; '.join(clauses[:3])}{more}."]


def _check_protocols(first: Path, second: Path) -> None:
    protocols = []
    for directory in (first, second):
        path = directory / FILE
        try:
            protocols.append(parse_json_object(path.read_text(encoding="utf-8")) if path.is_file() else {})
        except (OSError, ValueError) as error:
            raise ValueError(f"Cannot read the protocol {path}: {error}.") from error
    if all(protocols) and protocols[0].get("hash") != protocols[1].get("hash"):
        raise ValueError(
            f"{first} and {second} were measured by different protocols: from the first to the second, "
            f"{'; '.join(differences(*protocols)[:4])}. Numbers of two protocols cannot be compared."
        )
