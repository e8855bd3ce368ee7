"""Two runs beside each other: the rows that both have, paired by seed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from experiments.evaluate.protocol import FILE, differences
from experiments.report.effects import seeds_of
from experiments.report.records import Run, Variant, load_run
from experiments.report.statistics import Interval, bootstrap, log_ratios
from experiments.report.tables import mark, number


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
    """What two runs share, and what only one of them has."""

    changes: list[Change]
    only_first: list[str]
    only_second: list[str]


def compare(first: Path, second: Path) -> Comparison:
    """Compare the errors to the teacher of two runs of one protocol.

    Raises:
        ValueError: a folder is no run's; the runs were measured by different protocols, whose differences are named;
            or they share no finished row and seed.
    """
    one, two = load_run(first), load_run(second)
    _same_protocol(first, second)
    theirs = {v.name: v for v in two.variants}
    changes = [change for v in one.variants if v.name in theirs for change in _changes(one, two, v, theirs[v.name])]
    if not changes:
        raise ValueError(f"Nothing to compare: {first} and {second} share no variant with a finished cell of one seed.")
    names = {v.name for v in one.variants}
    return Comparison(
        changes,
        [v.label for v in one.variants if v.name not in theirs],
        [v.label for v in two.variants if v.name not in names],
    )


def as_table(found: Comparison) -> Table:
    """For a terminal; ▼ and ▲ where the interval over seeds excludes 1."""
    table = Table(
        "variant", "size", "first", "second", "second ÷ first", "95 % interval", "seeds", title="Error to teacher"
    )
    for change in found.changes:
        table.add_row(*_texts(change))
    return table


def as_markdown(found: Comparison, first: Path, second: Path) -> str:
    """The same as a page."""
    lines = [f"# {second.name} against {first.name}", "", "Error to the teacher, seed by seed; ▼ and ▲ where the 95 %"]
    lines += ["bootstrap interval over seeds excludes 1.", ""]
    lines += [
        "| variant | size | first | second | second ÷ first | 95 % interval | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(_texts(change)) + " |" for change in found.changes]
    for name, rows in ((first.name, found.only_first), (second.name, found.only_second)):
        lines += ["", f"Only in {name}: {', '.join(rows)}."] if rows else []
    return "\n".join(lines) + "\n"


def _texts(change: Change) -> list[str]:
    ratio = change.ratio
    inside = f"{number(ratio.low)} … {number(ratio.high)}" if ratio.seeds > 1 else "–"
    numbers = [number(change.first), number(change.second), mark(ratio) + number(ratio.mean), inside]
    return [change.label, f"{change.size} px", *numbers, str(ratio.seeds)]


def _changes(one: Run, two: Run, before: Variant, after: Variant) -> list[Change]:
    found = []
    for size in sorted(set(one.sizes) & set(two.sizes)):
        first, second = seeds_of(one, before, size), seeds_of(two, after, size)
        ratios = log_ratios(second, first)
        if ratios and not before.untouched:
            old, new = (sum(values[s] for s in ratios) / len(ratios) for values in (first, second))
            found.append(Change(before.label, size, old, new, bootstrap(list(ratios.values())).exp()))
    return found


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
