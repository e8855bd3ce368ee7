"""The table of `mixlab check`."""

from __future__ import annotations

import io

from rich.console import Console

from experiments.cli.conformance import ConformanceResult, print_results
from mixers import list_mixers
from mixers.testing import MIXER_CHECKS, CheckOutcome, conformance_cases


def test_the_table_fits_a_terminal() -> None:
    """All registered mixers at 80 columns, in cells as full as they get."""
    counts = {"passed": 19, "failed": 12, "known": 1}
    outcomes = [CheckOutcome("check_flops", status, "a message", 0.0) for status, n in counts.items() for _ in range(n)]
    everything = conformance_cases(list_mixers())
    console = Console(width=80, file=io.StringIO(), record=True)
    print_results([ConformanceResult(configuration, outcomes) for configuration in everything], console)
    table, _, rest = console.export_text().partition("passed checks; ")
    assert table.count("19 12✗ 1~") == len(everything)
    assert max(map(len, table.splitlines())) <= 80 and "…" not in table
    assert rest.startswith("N normalized, U not; – refused; ✗ failed; ~ known exception")
    assert f"{len(everything)} configurations: {12 * len(everything)} of {32 * len(everything)} checks failed." in rest


def test_a_single_mixer_is_listed_check_by_check() -> None:
    outcomes = [
        CheckOutcome(check.name, status, "the whole message", 0.0)
        for check, status in zip(MIXER_CHECKS, ("passed", "failed", "known"), strict=False)
    ]
    console = Console(width=80, file=io.StringIO(), record=True)
    configuration = conformance_cases(list_mixers()[:1])[0]
    print_results([ConformanceResult(configuration, outcomes)], console)
    text = console.export_text()
    for check, status in zip(MIXER_CHECKS, ("1 ✓", "1/1 ✗", "1/1 ~"), strict=False):
        assert f"{status} {check.name}" in text
        assert check.summary.split(",")[0] in text
    assert f"failed {configuration} {MIXER_CHECKS[1].name}\nthe whole message" in text
