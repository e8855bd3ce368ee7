"""The conformance suite as a table: what `mixlab check` runs and prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from mixers import list_mixers
from mixers.testing import Configuration, Outcome, checks_for, configurations, run_checks


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
        mixer = configuration()
        checks = [c for c in checks_for(mixer) if deep or configuration.is_default or not c.heavy]
        results.append(Result(configuration, run_checks(mixer, checks=checks)))
    if report:
        report(len(chosen), len(chosen), "checked")
    return results


def show(results: list[Result], console: Console) -> None:
    """Print a row a configuration, then why checks failed."""
    table = Table("mixer", "form", "causality", "normalised", "passed", "failed", "known", "seconds")
    for result in results:
        c, outcomes = result.configuration, result.outcomes
        counts = [sum(o.status == status for o in outcomes) for status in ("passed", "failed", "known")]
        style = "red" if counts[1] else "green"
        seconds = sum(o.seconds for o in outcomes)
        cells = (c.name, c.form, c.causality, "yes" if c.normalize else "no")
        passed, failed, known = (str(n) if n else "–" for n in counts)
        table.add_row(*cells, f"[{style}]{passed}[/]", f"[{style}]{failed}[/]", known, f"{seconds:.1f}")
    console.print(table)
    for result in results:
        for outcome in result.failed:
            console.print(f"\n[red]failed[/] {result.configuration} [bold]{outcome.check}[/]", soft_wrap=True)
            console.print(outcome.message, soft_wrap=True, highlight=False, markup=False)
    failures, total = sum(len(r.failed) for r in results), sum(len(r.outcomes) for r in results)
    verdict = f"[red]{failures} of {total} checks failed[/]" if failures else f"[green]all {total} checks pass[/]"
    console.print(f"{len(results)} configurations: {verdict}.")
