"""Tables of the report: what they are made of, and the main one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.ablation.description import VariantDescription
from experiments.core.statistics import Interval
from experiments.report.controls import ControlRows, excess_error, share_of_identity
from experiments.report.effects import SPLITS, Effect, correct_together, readable
from experiments.report.errors import METRIC, ratio
from experiments.report.formatting import format_number
from experiments.report.run_files import RunRecord

SPREAD = "mean ± half the range over seeds; no ± if there is one seed"


@dataclass(frozen=True)
class SeedSummary:
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
        return format_number(self.mean) + (f" ± {format_number(self.half_range)}" if self.seeds > 1 else "")


@dataclass(frozen=True)
class TableCell:
    """A table's cell: its text, what it is sorted by, and whether it is the best of its column."""

    text: str
    key: float | str
    best: bool = False

    @classmethod
    def of_summary(cls, value: SeedSummary | None, best: bool = False) -> TableCell:
        """Show a mean; a dash, which sorts last, if there is none."""
        if value is None:
            return cls("–", math.inf, best)
        return cls(str(value), math.inf if math.isnan(value.mean) else value.mean, best)

    @classmethod
    def of_interval(cls, interval: Interval | None, mark: str = "") -> TableCell:
        """Show an estimate with its interval in brackets; no brackets if a single seed gives none."""
        if interval is None:
            return cls("–", math.inf)
        if math.isnan(interval.mean):
            return cls("not finite", math.inf)
        bounds = f" [{format_number(interval.low)}, {format_number(interval.high)}]" if interval.has_bounds else ""
        return cls(f"{mark}{format_number(interval.mean)}{bounds}", interval.mean)


@dataclass(frozen=True)
class TableRow:
    """A row of a table: its label and its cells."""

    label: str
    cells: list[TableCell]


@dataclass(frozen=True)
class ReportTable:
    """A table for the page, Markdown and LaTeX alike; the first column holds the rows' labels."""

    columns: list[str]
    rows: list[TableRow]


def summarize(values: Sequence[float]) -> SeedSummary | None:
    """Return mean and half range; None of no values."""
    if not values:
        return None
    if not all(math.isfinite(v) for v in values):
        return SeedSummary(math.nan, math.nan, math.nan, math.nan, len(values))
    low = min(values)
    high = max(values)
    return SeedSummary(math.fsum(values) / len(values), (high - low) / 2, low, high, len(values))


def summarize_fidelity(run: RunRecord, variant: VariantDescription, size: int, quantity: str) -> SeedSummary | None:
    """Summarize a quantity of `fidelity` on held-out images of a size over seeds."""
    cells = [cell for cell in run.done(variant.name) if size in cell.fidelity]
    return summarize([getattr(cell.fidelity[size], quantity) for cell in cells])


def best_row(run: RunRecord, values: Sequence[SeedSummary | None], higher: bool = False) -> int | None:
    """Return the position of the best mean among the trained variants."""
    candidates = [
        (-value.mean if higher else value.mean, position)
        for position, (variant, value) in enumerate(zip(run.variants, values, strict=True))
        if value and not variant.untouched and math.isfinite(value.mean)
    ]
    return min(candidates)[1] if candidates else None


def main_table(run: RunRecord) -> ReportTable:
    """Relative error to the teacher, the same over the reference row's, and the error ratio to the truth, by size.

    The untouched softmax cannot be the best.
    """
    heads = {METRIC: "Error to teacher", "error_ratio": "Error ratio to truth"}
    keys = [(size, quantity) for quantity in heads for size in run.sizes]
    values = {v.name: [summarize_fidelity(run, v, *key) for key in keys] for v in run.variants}
    best = [best_row(run, [values[v.name][k] for v in run.variants]) for k in range(len(keys))]
    split = len(run.sizes)
    rows = []
    for position, variant in enumerate(run.variants):
        pairs = zip(values[variant.name], best, strict=True)
        errors = [TableCell.of_summary(value, position == which) for value, which in pairs]
        cells = [*_facts(run, variant), *errors[:split], *_against_reference(run, variant), *errors[split:]]
        rows.append(TableRow(variant.label, cells))
    errors_at = [f"{heads[quantity]}, {size} px" for size, quantity in keys]
    against = [f"÷ reference, {size} px" for size in run.sizes] if run.reference else []
    first = ["Variant", "Features", "Seeds", "Trained parameters"]
    return ReportTable([*first, *errors_at[:split], *against, *errors_at[split:]], rows)


def controls_table(run: RunRecord, controls: ControlRows) -> ReportTable:
    """Errors as the excess over distilled softmax and as a share of identity's, by size; no rows without controls."""
    columns = ["Variant"]
    columns += [f"Excess over distilled softmax, {size} px" for size in run.sizes if controls.distilled_softmax]
    columns += [f"Share of identity's error, {size} px" for size in run.sizes if controls.identity]
    rows = []
    for variant in run.trained if len(columns) > 1 else []:
        cells = []
        if controls.distilled_softmax:
            cells += [TableCell.of_interval(excess_error(run, variant, controls, size)) for size in run.sizes]
        if controls.identity:
            cells += [TableCell.of_interval(share_of_identity(run, variant, controls, size)) for size in run.sizes]
        rows.append(TableRow(variant.label, cells))
    return ReportTable(columns, rows)


def splits_table(run: RunRecord) -> ReportTable:
    """Relative error to the teacher on held-out and held-in images, at sizes that have both; no rows if none has."""
    sizes = [size for size in run.sizes if any(size in cell.held_in for cell in run.cells)]
    columns = ["Variant", *(f"{split}, {size} px" for size in sizes for split in ("held out", "held in"))]
    rows = []
    for variant in run.trained:
        cells = []
        for size in sizes:
            for errors in ([c.fidelity for c in run.done(variant.name)], [c.held_in for c in run.done(variant.name)]):
                values = [by_size[size].relative_error_to_teacher for by_size in errors if size in by_size]
                cells.append(TableCell.of_summary(summarize(values)))
        rows.append(TableRow(variant.label, cells))
    return ReportTable(columns, rows if sizes else [])


def effects_table(run: RunRecord, effects: list[Effect]) -> ReportTable:
    """Each factor's effect at each size: over all rows, among those of each value of the others, and pair by pair.

    The p-values of parts of the rows are corrected for all effects and parts of the table.
    """
    by_name: dict[str, list[Effect]] = {}
    for effect in effects:
        by_name.setdefault(effect.name, []).append(effect)
    lines: dict[tuple[str, str], dict[int, Effect]] = {}
    parts: dict[tuple[str, str, int], Effect] = {}
    for name, at_sizes in by_name.items():
        lines[name, "all rows"] = {effect.size: effect for effect in at_sizes}
        split = [field for field in SPLITS if any(effect.split_by(field) for effect in at_sizes)]
        for fields in (*([field] for field in split), *([split] if len(split) > 1 else [])):
            for effect in at_sizes:
                for values, part in effect.parts(*fields).items():
                    among = ", ".join(readable(run, value) for value in values)
                    lines.setdefault((name, among), {})
                    parts[name, among, effect.size] = part
    corrected = correct_together([*effects, *parts.values()])[len(effects) :]
    for (name, among, size), part in zip(parts, corrected, strict=True):
        lines[name, among][size] = part
    rows = []
    for (name, among), by_size in lines.items():
        ratios = [TableCell.of_interval(e.ratio, effect_mark(e)) if (e := by_size.get(s)) else _DASH for s in run.sizes]
        pairs = max(len(effect.pairs) for effect in by_size.values())
        planned = max(effect.planned for effect in by_size.values())
        seeds = max(effect.ratio.count for effect in by_size.values())
        counted = TableCell(str(pairs) if pairs == planned else f"{pairs} of {planned}", pairs)
        rows.append(TableRow(name, [TableCell(among, among), *ratios, counted, TableCell(str(seeds), seeds)]))
    return ReportTable(["Factor", "Among", *(f"{s} px" for s in run.sizes), "Pairs", "Seeds"], rows)


def shape_table(run: RunRecord) -> ReportTable:
    """Relative error to the teacher at other aspect ratios; no rows if none was measured."""
    shapes = sorted({shape for variant in run.variants for cell in run.done(variant.name) for shape in cell.shapes})
    values = {
        v.label: [
            summarize([c.shapes[s].relative_error_to_teacher for c in run.done(v.name) if s in c.shapes])
            for s in shapes
        ]
        for v in run.variants
    }
    best = [best_row(run, [row[k] for row in values.values()]) for k in range(len(shapes))]
    rows = [
        TableRow(label, [TableCell.of_summary(x, position == b) for x, b in zip(row, best, strict=True)])
        for position, (label, row) in enumerate(values.items())
    ]
    return ReportTable(["Variant", *(f"{w} × {h} px" for h, w in shapes)], rows if shapes else [])


def effect_mark(effect: Effect) -> str:
    """▼ for a lower and ▲ for a higher error, if the effect is distinguishable from noise; otherwise empty."""
    if not effect.significant:
        return ""
    return "▲ " if effect.ratio.mean > 1 else "▼ "


def interval_mark(interval: Interval) -> str:
    """▼ and ▲ by the interval alone, for comparisons that are not tested together."""
    return ("▲ " if interval.low > 1 else "▼ ") if interval.excludes(1.0) else ""


def markdown(table: ReportTable) -> str:
    """Return the table in Markdown; the best of a column is bold."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    for row in table.rows:
        texts = [f"**{cell.text}**" if cell.best else cell.text for cell in row.cells]
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in [row.label, *texts]) + " |")
    return "\n".join(lines) + "\n"


_DASH = TableCell("–", math.inf)


def _facts(run: RunRecord, variant: VariantDescription) -> list[TableCell]:
    cells = run.done(variant.name)
    counts = sorted({cell.result.trained_parameters for cell in cells if cell.result})
    features = _describe_features(variant)
    return [
        TableCell(features, features),
        TableCell(str(len(cells)), len(cells)),
        TableCell(" / ".join(f"{n:,}" for n in counts) or "–", max(counts, default=math.inf)),
    ]


def _against_reference(run: RunRecord, variant: VariantDescription) -> list[TableCell]:
    if run.reference is None:
        return []
    if variant == run.reference:
        return [TableCell("1", 1.0) for _ in run.sizes]
    ratios = [None if variant.untouched else ratio(run, variant, run.reference, size) for size in run.sizes]
    return [TableCell.of_interval(value, interval_mark(value) if value else "") for value in ratios]


def _describe_features(variant: VariantDescription) -> str:
    if variant.untouched:
        return "the teacher's own"
    levels = {"normalized": "normalized", "not normalized": "unnormalized", "mean scale": 'unnormalized, scale="mean"'}
    return f"{variant.causality.replace('noncausal', 'non-causal')}, {levels[variant.normalization]}"
