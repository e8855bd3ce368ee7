"""The conformance suite as a table: what `mixlab check` runs and prints."""

from __future__ import annotations

import itertools
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from mixers import list_mixers
from mixers.testing import CHECKS, Check, Configuration, Outcome, checks_for, configurations, run_checks
from mixers.traits import CAUSALITIES

_SHORT = {"causal": "causal", "bidirectional": "bidir.", "noncausal": "non-c."}
_MARKS = {"passed": ("✓", "green"), "failed": ("✗", "red"), "known": ("~", "yellow")}


@dataclass(frozen=True)
class Result:
    """The outcomes of one configuration."""

    configuration: Configuration
    outcomes: list[Outcome]

    @property
    def failed(self) -> list[Outcome]:
        """Checks that failed unforeseen."""
        return [outcome for outcome in self.outcomes if outcome.status == "failed"]


def check_mixers(
    pattern: str = "*", deep: bool = False, report: Callable[[int, int, str], None] | None = None
) -> list[Result]:
    """Run every check on every configuration of the mixers that match a pattern.

    Args:
        pattern: wildcard pattern of registered names.
        deep: run the checks that take seconds on every configuration, not on the published one alone.
        report: called with (configurations done, their number, the one that runs).

    Raises:
        ValueError: no mixer matches.
    """
    names = list_mixers(pattern)
    if not names:
        raise ValueError(f"No mixer matches {pattern!r}: expected one of {', '.join(list_mixers())}.")
    chosen, results = configurations(names), []
    for done, configuration in enumerate(chosen):
        if report:
            report(done, len(chosen), str(configuration))
        results.append(_check(configuration, deep))
    if report:
        report(len(chosen), len(chosen), "checked")
    return results


def _check(configuration: Configuration, deep: bool) -> Result:
    """Its outcomes; one failure, `builds`, of a configuration that cannot be built or cannot tell its traits."""
    try:
        mixer = configuration()
        checks = [c for c in checks_for(mixer) if deep or configuration.is_default or not c.heavy]
    except Exception as error:  # one broken mixer must not take the others away
        *_, last = traceback.extract_tb(error.__traceback__)
        told = ": ".join(part for part in (type(error).__name__, str(error)) if part)
        message = f"cannot be built: {told} (in {last.name}, {Path(last.filename).name} line {last.lineno})"
        return Result(configuration, [Outcome("builds", "failed", message, 0.0)])
    return Result(configuration, run_checks(mixer, checks=checks))


def show(results: list[Result], console: Console) -> None:
    """Print a row a mixer and form; of a single mixer also what was checked; then why checks failed."""
    console.print(_table(results))
    legend = "passed checks; N normalized, U not; – refused"
    statuses = {outcome.status for result in results for outcome in result.outcomes}
    legend += "; ✗ failed" if "failed" in statuses else ""
    legend += "; ~ known exception" if "known" in statuses else ""
    console.print(legend, style="dim", highlight=False)
    if len({result.configuration.name for result in results}) == 1:
        console.print(_list(results))
    for result in results:
        for outcome in result.failed:
            title = Text.assemble("\n", ("failed", "red"), f" {result.configuration} ", (outcome.check, "bold"))
            console.print(title, soft_wrap=True)
            console.print(outcome.message, soft_wrap=True, highlight=False, markup=False)
    failures, total = sum(len(r.failed) for r in results), sum(len(r.outcomes) for r in results)
    verdict = f"[red]{failures} of {total} checks failed[/]" if failures else f"[green]all {total} checks pass[/]"
    console.print(f"{len(results)} configurations: {verdict}.")


def _table(results: list[Result]) -> Table:
    """Mixers and forms × causality and normalization."""
    switches = list(itertools.product(CAUSALITIES, (True, False)))
    heads = [f"{_SHORT[causality]}\n{'N' if normalize else 'U'}" for causality, normalize in switches]
    columns = [Column(header, justify="right", no_wrap=True) for header in heads]
    first = (Column("mixer", overflow="fold"), Column("form", no_wrap=True))
    table = Table(*first, *columns, box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    rows: dict[tuple[str, str], dict[tuple[str, bool], Result]] = defaultdict(dict)
    for result in results:
        c = result.configuration
        rows[c.name, c.form][c.causality, c.normalize] = result
    for (name, form), cells in rows.items():
        table.add_row(name, form, *(_cell(cells.get(switch)) for switch in switches))
    return table


def _cell(result: Result | None) -> Text:
    """How many checks passed, failed and are known to fail; "–" where the registry refuses."""
    if result is None:
        return Text("–", style="dim")
    counts = {status: sum(o.status == status for o in result.outcomes) for status in _MARKS}
    style = "red" if counts["failed"] else "green"
    others = [f"{counts[s]}{_MARKS[s][0]}" for s in ("failed", "known") if counts[s]]
    return Text(" ".join([str(counts["passed"]), *others]), style=style)


def _list(results: list[Result]) -> Table:
    """Every check that ran: in how many configurations, what became of it, and what it says."""
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in (o for result in results for o in result.outcomes):
        outcomes[outcome.check].append(outcome)
    table = Table.grid(Column(justify="right", no_wrap=True), Column(), padding=(0, 1))
    for check in CHECKS:
        if check.name in outcomes:
            table.add_row(_status(outcomes[check.name]), _described(check))
    return table


def _status(outcomes: list[Outcome]) -> Text:
    worst = next(s for s in ("failed", "known", "passed") if any(o.status == s for o in outcomes))
    mark, style = _MARKS[worst]
    count, total = sum(o.status == worst for o in outcomes), len(outcomes)
    return Text(f"{count}/{total} {mark}" if worst != "passed" else f"{total} {mark}", style=style)


def _described(check: Check) -> Text:
    return Text.assemble((check.name, "bold"), "\n", (check.summary, "dim"))
