"""The conformance suite as a table: what `mixlab check` runs and prints."""

from __future__ import annotations

import itertools
import traceback
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from experiments.core.progress import ProgressCallback, ignore_progress
from mixers import list_mixers
from mixers.testing import (
    MIXER_CHECKS,
    CheckOutcome,
    ConformanceCase,
    MixerCheck,
    checks_for,
    conformance_cases,
    run_checks,
)
from mixers.traits import CAUSALITIES

_SHORT_CAUSALITY = {"causal": "causal", "bidirectional": "bidir.", "noncausal": "non-c."}
_STATUS_MARKS = {"passed": ("✓", "green"), "failed": ("✗", "red"), "known": ("~", "yellow")}


@dataclass(frozen=True)
class ConformanceResult:
    """The outcomes of all checks on one configuration."""

    configuration: ConformanceCase
    outcomes: list[CheckOutcome]

    @property
    def failures(self) -> list[CheckOutcome]:
        """The checks that failed, without the known failures."""
        return [outcome for outcome in self.outcomes if outcome.status == "failed"]


def check_mixers(
    pattern: str = "*", deep: bool = False, progress: ProgressCallback = ignore_progress
) -> list[ConformanceResult]:
    """Run every check on every configuration of the mixers that match a pattern.

    Args:
        pattern: wildcard pattern of registered names.
        deep: run the checks that take seconds on every configuration, not only on the published one.
        progress: called before each configuration.

    Raises:
        ValueError: no mixer matches.
    """
    names = list_mixers(pattern)
    if not names:
        raise ValueError(f"No mixer matches {pattern!r}: expected one of {', '.join(list_mixers())}.")
    selected = conformance_cases(names)
    results = []
    for number, configuration in enumerate(selected):
        progress(str(configuration), number, len(selected))
        results.append(_check(configuration, deep))
    progress("checked", len(selected), len(selected))
    return results


def _check(configuration: ConformanceCase, deep: bool) -> ConformanceResult:
    """Return its outcomes; a single failure, `builds`, if it cannot be built or its traits cannot be read."""
    try:
        mixer = configuration()
        checks = [c for c in checks_for(mixer) if deep or configuration.is_default or not c.heavy]
    except Exception as error:  # one broken mixer must not hide the others
        *_, last = traceback.extract_tb(error.__traceback__)
        reason = ": ".join(part for part in (type(error).__name__, str(error)) if part)
        message = f"cannot be built: {reason} (in {last.name}, {Path(last.filename).name} line {last.lineno})"
        return ConformanceResult(configuration, [CheckOutcome("builds", "failed", message, 0.0)])
    return ConformanceResult(configuration, run_checks(mixer, checks=checks))


def print_results(results: list[ConformanceResult], console: Console) -> None:
    """Print a row per mixer and form; for a single mixer also the list of checks; then why checks failed."""
    console.print(_overview(results))
    statuses = {outcome.status for result in results for outcome in result.outcomes}
    legend = "passed checks; N normalized, U not; – refused"
    legend += "; ✗ failed" if "failed" in statuses else ""
    legend += "; ~ known exception" if "known" in statuses else ""
    console.print(legend, style="dim", highlight=False)
    if len({result.configuration.name for result in results}) == 1:
        console.print(_check_list(results))
    for result in results:
        for outcome in result.failures:
            title = Text.assemble("\n", ("failed", "red"), f" {result.configuration} ", (outcome.check, "bold"))
            console.print(title, soft_wrap=True)
            console.print(outcome.message, soft_wrap=True, highlight=False, markup=False)
    failures = sum(len(result.failures) for result in results)
    total = sum(len(result.outcomes) for result in results)
    verdict = (f"{failures} of {total} checks failed", "red") if failures else (f"all {total} checks pass", "green")
    console.print(Text.assemble(f"{len(results)} configurations: ", verdict, "."))


def _overview(results: list[ConformanceResult]) -> Table:
    """Return the table of mixers and forms × causality and normalization."""
    switches = list(itertools.product(CAUSALITIES, (True, False)))
    headers = [f"{_SHORT_CAUSALITY[causality]}\n{'N' if normalize else 'U'}" for causality, normalize in switches]
    columns = [Column(header, justify="right", no_wrap=True) for header in headers]
    first = (Column("mixer", overflow="fold"), Column("form", no_wrap=True))
    table = Table(*first, *columns, box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    rows: dict[tuple[str, str], dict[tuple[str, bool], ConformanceResult]] = defaultdict(dict)
    for result in results:
        c = result.configuration
        rows[c.name, c.form][c.causality, c.normalize] = result
    for (name, form), cells in rows.items():
        table.add_row(name, form, *(_format_cell(cells.get(switch)) for switch in switches))
    return table


def _format_cell(result: ConformanceResult | None) -> Text:
    """Return how many checks passed, failed and are known to fail; "–" if the registry refuses the configuration."""
    if result is None:
        return Text("–", style="dim")
    counts = {status: sum(o.status == status for o in result.outcomes) for status in _STATUS_MARKS}
    style = "red" if counts["failed"] else "green"
    others = [f"{counts[s]}{_STATUS_MARKS[s][0]}" for s in ("failed", "known") if counts[s]]
    return Text(" ".join([str(counts["passed"]), *others]), style=style)


def _check_list(results: list[ConformanceResult]) -> Table:
    """Return every check that ran: in how many configurations, with which outcome, and what it asserts."""
    outcomes: dict[str, list[CheckOutcome]] = defaultdict(list)
    for result in results:
        for outcome in result.outcomes:
            outcomes[outcome.check].append(outcome)
    table = Table.grid(Column(justify="right", no_wrap=True), Column(), padding=(0, 1))
    for check in MIXER_CHECKS:
        if check.name in outcomes:
            table.add_row(_format_status(outcomes[check.name]), _format_check(check))
    return table


def _format_status(outcomes: list[CheckOutcome]) -> Text:
    worst = next(s for s in ("failed", "known", "passed") if any(o.status == s for o in outcomes))
    mark, style = _STATUS_MARKS[worst]
    count = sum(o.status == worst for o in outcomes)
    total = len(outcomes)
    return Text(f"{count}/{total} {mark}" if worst != "passed" else f"{total} {mark}", style=style)


def _format_check(check: MixerCheck) -> Text:
    return Text.assemble((check.name, "bold"), "\n", (check.summary, "dim"))
