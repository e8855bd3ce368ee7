"""Numbers over seeds: the main table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from experiments.report.effects import SPLITS, Effect, against, reads
from experiments.report.records import Run, Variant
from experiments.report.statistics import Interval

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
class Entry:
    """A table's cell: what it says, what it is sorted by, and whether it is the best of its column."""

    text: str
    key: float | str
    best: bool = False

    @classmethod
    def of(cls, value: Value | None, best: bool = False) -> Entry:
        """A dash, which sorts last, where there is no value."""
        missing = value is None or math.isnan(value.mean)
        return cls("–" if value is None else str(value), math.inf if missing or value is None else value.mean, best)

    @classmethod
    def of_ratio(cls, ratio: Interval | None) -> Entry:
        """▼ lower and ▲ higher where the interval over seeds excludes 1; without brackets of one seed."""
        if ratio is None or math.isnan(ratio.mean):
            return cls("–" if ratio is None else "not finite", math.inf)
        inside = f" [{number(ratio.low)}, {number(ratio.high)}]" if ratio.seeds > 1 else ""
        mark = ("▲ " if ratio.low > 1 else "▼ ") if ratio.excludes(1.0) else ""
        return cls(f"{mark}{number(ratio.mean)}{inside}", ratio.mean)


@dataclass(frozen=True)
class Row:
    """A line of a table, and what it is of."""

    label: str
    entries: list[Entry]


@dataclass(frozen=True)
class Table:
    """A table for the page, Markdown and LaTeX alike; the first column is the rows' labels."""

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


def summarize(values: list[float]) -> Value | None:
    """Mean and half range; None of nothing."""
    if not values:
        return None
    if not all(math.isfinite(v) for v in values):
        return Value(math.nan, math.nan, math.nan, math.nan, len(values))
    low, high = min(values), max(values)
    return Value(math.fsum(values) / len(values), (high - low) / 2, low, high, len(values))


def over_seeds(run: Run, variant: Variant, size: int, metric: str) -> Value | None:
    """A fidelity metric of a variant at a size."""
    return summarize([getattr(c.fidelity[size], metric) for c in run.done(variant.name) if size in c.fidelity])


def main_table(run: Run) -> Table:
    """Relative error to the teacher, that over the reference row's, and the error ratio to the truth, at each size.

    The untouched softmax cannot be the best.
    """
    keys = [(size, m) for m in ("relative_error_to_teacher", "error_ratio") for size in run.sizes]
    heads = {"relative_error_to_teacher": "Error to teacher", "error_ratio": "Error ratio to truth"}
    values = {v.name: [over_seeds(run, v, size, m) for size, m in keys] for v in run.variants}
    marked = [best_row(run, [values[v.name][k] for v in run.variants]) for k in range(len(keys))]
    rows = []
    for place, variant in enumerate(run.variants):
        done = run.done(variant.name)
        counts = {c.trained_parameters for c in done if c.trained_parameters is not None}
        entries = [Entry(_feature(variant), _feature(variant)), Entry(str(len(done)), len(done))]
        entries.append(Entry(" / ".join(f"{n:,}" for n in sorted(counts)) or "–", max(counts, default=math.inf)))
        found = zip(values[variant.name], marked, strict=True)
        errors = [Entry.of(x, place == best) for x, best in found]
        split = len(run.sizes)
        rows.append(Row(variant.label, [*entries, *errors[:split], *_compared(run, variant), *errors[split:]]))
    errors_at = [f"{heads[m]}, {size} px" for size, m in keys]
    than = [f"÷ reference, {size} px" for size in run.sizes] if run.reference else []
    first = ["Variant", "Features", "Seeds", "Trained parameters"]
    return Table([*first, *errors_at[: len(run.sizes)], *than, *errors_at[len(run.sizes) :]], rows)


def effects_table(run: Run, effects: list[Effect]) -> Table:
    """What each factor does at each size: over all rows, among those of each value of the others, and pair by pair."""
    found: dict[tuple[str, str], dict[int, Effect]] = {}
    by_name: dict[str, list[Effect]] = {}
    for effect in effects:
        by_name.setdefault(f"{effect.above} ÷ {effect.below}", []).append(effect)
    for name, at_sizes in by_name.items():
        found[name, "all rows"] = {effect.size: effect for effect in at_sizes}
        split = [field for field in SPLITS if any(effect.among(field) for effect in at_sizes)]
        for fields in (*([field] for field in split), *([split] if len(split) > 1 else [])):
            for effect in at_sizes:
                for values, part in effect.parts(*fields).items():
                    told = ", ".join(reads(run, value) for value in values)
                    found.setdefault((name, told), {})[effect.size] = part
    rows = []
    for (name, among), by_size in found.items():
        counts = max(len(e.pairs) for e in by_size.values()), max(e.ratio.seeds for e in by_size.values())
        ratios = [Entry.of_ratio(by_size[s].ratio if s in by_size else None) for s in run.sizes]
        rows.append(Row(name, [Entry(among, among), *ratios, *(Entry(str(n), n) for n in counts)]))
    return Table(["Factor", "Among", *(f"{s} px" for s in run.sizes), "Pairs", "Seeds"], rows)


def shape_table(run: Run) -> Table:
    """Relative error to the teacher at other aspect ratios, no rows if there are none."""
    shapes = sorted({shape for v in run.variants for c in run.done(v.name) for shape in c.shapes})
    found = {
        v.label: [
            summarize([c.shapes[s].relative_error_to_teacher for c in run.done(v.name) if s in c.shapes])
            for s in shapes
        ]
        for v in run.variants
    }
    best = [best_row(run, [values[k] for values in found.values()]) for k in range(len(shapes))]
    rows = [
        Row(label, [Entry.of(x, place == b) for x, b in zip(values, best, strict=True)])
        for place, (label, values) in enumerate(found.items())
    ]
    return Table(["Variant", *(f"{w} × {h} px" for h, w in shapes)], rows if shapes else [])


def picture_table(run: Run) -> Table:
    """Fréchet and kernel distance and text-image score of each row's pictures, no rows if there are none."""
    places = list(dict.fromkeys(_place(r) for v in run.variants for c in run.done(v.name) for r in c.images))
    rows: list[Row] = []
    teacher: dict[Any, Value | None] = {}
    for variant in run.variants if places else []:
        measured = [r for c in run.done(variant.name) for r in c.images]
        found = {place: [r for r in measured if _place(r) == place] for place in places}
        teacher |= {place: _mean_of(rows, "teacher") for place, rows in found.items() if rows}
        rows.append(Row(variant.label, [Entry.of(_mean_of(rows, "student")) for rows in found.values()]))
    if places:
        rows.insert(0, Row("teacher", [Entry.of(teacher[place]) for place in places]))
    heads = [
        f"{m.replace('_', ' ')}, {f}, {h} px" + ("" if h == w else f" × {w}") + f", guidance {g:g}"
        for m, f, h, w, g in places
    ]
    return Table(["Variant", *heads], rows)


def _place(row: dict[str, Any]) -> tuple[str, str, int, int, float]:
    return row["metric"], row["features"], row["height"], row["width"], float(row["guidance"])


def _mean_of(rows: list[dict[str, Any]], name: str) -> Value | None:
    return summarize([math.nan if r[name] is None else float(r[name]) for r in rows])


def _compared(run: Run, variant: Variant) -> list[Entry]:
    """Ratios to the reference row."""
    if run.reference is None:
        return []
    if variant == run.reference:
        return [Entry("1", 1.0) for _ in run.sizes]
    ratios = [None if variant.untouched else against(run, variant, run.reference, size) for size in run.sizes]
    return [Entry.of_ratio(ratio) for ratio in ratios]


def markdown(table: Table) -> str:
    """The table in Markdown; the best of a column is bold."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    for row in table.rows:
        cells = [f"**{e.text}**" if e.best else e.text for e in row.entries]
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in [row.label, *cells]) + " |")
    return "\n".join(lines) + "\n"


def best_row(run: Run, values: list[Value | None]) -> int | None:
    """Place of the smallest mean among the trained variants."""
    pairs = zip(run.variants, values, strict=True)
    found = [(x.mean, k) for k, (v, x) in enumerate(pairs) if x and not v.untouched and math.isfinite(x.mean)]
    return min(found)[1] if found else None


def _feature(variant: Variant) -> str:
    if variant.untouched:
        return "the teacher's own"
    normal = {True: "normalized", False: "unnormalized", None: "default normalization"}[variant.normalize]
    return f"{(variant.causality or 'default order').replace('noncausal', 'non-causal')}, {normal}"
