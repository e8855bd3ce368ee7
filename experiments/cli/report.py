"""`mixlab report` and `mixlab compare`: what runs left, as pages and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments.cli.app import app, clean_errors, console

RunFolder = Annotated[Path, typer.Argument(help="a run's folder")]


@app.command()
def report(directory: RunFolder) -> None:
    """Build the report of a run again, from its files alone."""
    from experiments.report import build_report

    with clean_errors():
        console.print(f"Report: {build_report(directory).resolve()}", soft_wrap=True)


@app.command()
def compare(
    first: RunFolder,
    second: RunFolder,
    out: Annotated[Path | None, typer.Option(help="write the comparison as a page, .html or .md")] = None,
) -> None:
    """Put two runs of one protocol beside each other: the rows that both have, paired by seed."""
    from experiments.report import compare as comparison

    with clean_errors():
        found = comparison.compare(first, second)
        if out is not None:
            comparison.write(found, out)
    console.print(comparison.for_terminal(found))
    for line in (comparison.summary(found), *found.notes):
        console.print(line, markup=False)
