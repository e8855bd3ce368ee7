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
    out: Annotated[Path | None, typer.Option(help="write the comparison as a Markdown file")] = None,
) -> None:
    """Put two runs of one protocol beside each other: the rows that both have, paired by seed."""
    from experiments.report.compare import as_markdown, as_table
    from experiments.report.compare import compare as run

    with clean_errors():
        found = run(first, second)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(as_markdown(found, first, second), encoding="utf-8")
    console.print(as_table(found))
    for name, rows in ((first, found.only_first), (second, found.only_second)):
        if rows:
            console.print(f"Only in {name}: {', '.join(rows)}.")
