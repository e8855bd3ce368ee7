"""Two runs beside each other: the rows that both have, paired by seed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import rich.markup
import rich.table

from experiments.evaluate.protocol import FILE, differences
from experiments.report.effects import seeds_of
from experiments.report.html import render
from experiments.report.records import Run, Variant, load_run
from experiments.report.statistics import Interval, bootstrap, log_ratios
from experiments.report.tables import Entry, Row, Table, markdown, number


@dataclass(frozen=True)
class Change:
    """A row's error at a size in the second run over that in the first, seed by seed."""

    label: str
    size: int
    first: float
    second: float
    ratio: Interval


@dataclass(frozen=True)
class Comparison:
    """What two runs, named after their folders, share, and what only one of them has."""

    names: tuple[str, str]
    changes: list[Change]
    alone: tuple[list[str], list[str]]
    unlike: list[str]

    @property
    def notes(self) -> list[str]:
        """Which rows only one has, and which are not of the same thing in both."""
        pairs = zip(self.names, self.alone, strict=True)
        return [*self.unlike, *(f"Only in {name}: {', '.join(rows)}." for name, rows in pairs if rows)]


def compare(first: Path, second: Path) -> Comparison:
    """Compare the errors to the teacher of two runs of one protocol.

    Raises:
        ValueError: a folder is no run's; the runs were measured by different protocols, whose differences are named;
            or they share no finished row and seed.
    """
    one, two = load_run(first), load_run(second)
    _same_protocol(first, second)
    mine, theirs = ({v.name: v for v in run.variants} for run in (one, two))
    changes = [change for n, v in mine.items() if n in theirs for change in _changes(one, two, v, theirs[n])]
    if not changes:
        raise ValueError(f"Nothing to compare: {first} and {second} share no variant with a finished cell of one seed.")
    alone = [v.label for n, v in mine.items() if n not in theirs], [v.label for n, v in theirs.items() if n not in mine]
    names = (first.resolve().name, second.resolve().name)
    unlike = [told for n, v in mine.items() if n in theirs for told in _unlike(one, two, v, theirs[n])]
    return Comparison(names if names[0] != names[1] else (str(first), str(second)), changes, alone, unlike)


def as_table(found: Comparison) -> Table:
    """A row a variant and size."""
    first, second = found.names
    rows = [
        Row(
            change.label,
            [
                Entry(f"{change.size} px", change.size),
                *(Entry(number(value), value) for value in (change.first, change.second)),
                Entry.of_ratio(change.ratio),
                Entry(str(change.ratio.seeds), change.ratio.seeds),
            ],
        )
        for change in found.changes
    ]
    return Table(["Variant", "Size", first, second, f"{second} ÷ {first}", "Seeds"], rows)


def for_terminal(found: Comparison) -> rich.table.Table:
    """The same for a terminal."""
    table = as_table(found)
    shown = rich.table.Table(*(rich.markup.escape(c) for c in table.columns), title="Error to the teacher")
    for row in table.rows:
        shown.add_row(*(rich.markup.escape(text) for text in (row.label, *(e.text for e in row.entries))))
    return shown


def summary(found: Comparison) -> str:
    """How many rows changed beyond chance, and which most."""
    first, second = found.names
    marked = [c for c in found.changes if c.ratio.excludes(1.0)]
    higher = sum(c.ratio.low > 1 for c in marked)
    told = (
        f"Of {len(found.changes)} rows and sizes, {len(marked) - higher} have a lower error to the teacher in {second} "
    )
    told += f"than in {first} beyond chance, and {higher} a higher one."
    if marked:
        most = max(marked, key=lambda c: abs(math.log(c.ratio.mean)) if c.ratio.mean > 0 else math.inf)
        told += f" The largest: {most.label} at {most.size} px, {Entry.of_ratio(most.ratio).text}."
    seeds = min(c.ratio.seeds for c in found.changes)
    if seeds < 3:
        told += f" Some rows share only {seeds} seed{'s' * (seeds > 1)}: too few to tell a change from chance."
    return told


NOTE = (
    "Error to the teacher, means over the seeds that both runs have; their ratio, seed by seed, with its 95 % "
    "bootstrap interval over seeds; ▼ lower and ▲ higher where the interval excludes 1."
)


def as_markdown(found: Comparison) -> str:
    """For a repository."""
    title = f"# {found.names[1]} against {found.names[0]}"
    return "\n\n".join([title, summary(found), NOTE, markdown(as_table(found)).strip(), *found.notes]) + "\n"


def as_html(found: Comparison) -> str:
    """A page that sorts and filters, in the report's dress."""
    title = f"{found.names[1]} against {found.names[0]}"
    table = as_table(found)
    return render("compare.html.j2", title=title, table=table, summary=summary(found), note=NOTE, alone=found.notes)


def write(found: Comparison, path: Path) -> None:
    """The page as HTML or Markdown, by the ending of the file's name.

    Raises:
        ValueError: another ending.
    """
    forms = {".html": as_html, ".md": as_markdown}
    if path.suffix not in forms:
        raise ValueError(f"Cannot write {path}: a comparison is a page, .html or .md; got the ending {path.suffix!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(forms[path.suffix](found), encoding="utf-8")


def _changes(one: Run, two: Run, before: Variant, after: Variant) -> list[Change]:
    found = []
    for size in sorted(set(one.sizes) & set(two.sizes)):
        first, second = seeds_of(one, before, size), seeds_of(two, after, size)
        ratios = log_ratios(second, first)
        if ratios and not before.untouched:
            old, new = (sum(values[s] for s in ratios) / len(ratios) for values in (first, second))
            found.append(Change(before.label, size, old, new, bootstrap(list(ratios.values())).exp()))
    return found


def _unlike(one: Run, two: Run, before: Variant, after: Variant) -> list[str]:
    """What two rows of one name differ in, themselves or in how they were distilled."""
    old, new = (
        {
            **{f: getattr(v, f) for f in Variant.DESIGN},
            "distillation": v.distillation or run.protocol.get("distillation"),
        }
        for run, v in ((one, before), (two, after))
    )
    if before.untouched or old == new:
        return []
    told = differences(old, new)
    more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
    return [f"“{before.label}” is not the same in both: from the first to the second, {'; '.join(told[:3])}{more}."]


def _same_protocol(first: Path, second: Path) -> None:
    """Runs older than protocols have none, and are compared by what they say."""
    found = []
    for directory in (first, second):
        path = directory / FILE
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})
        except (OSError, ValueError) as error:
            raise ValueError(f"Cannot read the protocol {path}: {error}.") from error
    if all(found) and found[0].get("hash") != found[1].get("hash"):
        raise ValueError(
            f"{first} and {second} were measured by different protocols: from the first to the second, "
            f"{'; '.join(differences(*found)[:4])}. Numbers of two protocols are not compared."
        )
