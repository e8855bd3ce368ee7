"""`mixlab report`, `compare` and `collect`: what runs recorded, as pages and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments.cli.app import Plugins, app, clean_errors, console, load_plugins
from experiments.cli.option_checks import check_file

RunFolder = Annotated[Path, typer.Argument(help="a run's folder")]


@app.command()
def report(
    directory: RunFolder,
    plugins: Plugins = [],  # noqa: B006 - typer reads the default and never changes it
) -> None:
    """Rebuild the report of a run from its files alone; metrics of plug-ins need their --plugin."""
    from experiments.report import build_report

    load_plugins(plugins)
    with clean_errors():
        console.print(f"Report: {build_report(directory).resolve()}", soft_wrap=True)


@app.command()
def compare(
    first: RunFolder,
    second: RunFolder,
    out: Annotated[
        Path | None, typer.Option(help="write the comparison as a page, .html or .md", callback=check_file)
    ] = None,
) -> None:
    """Compare two runs of one protocol: the rows that both have, paired by seed and image."""
    from experiments.report import compare as comparisons

    with clean_errors():
        comparison = comparisons.compare_runs(first, second)
        if out is not None:
            comparisons.write_comparison(comparison, out)
    console.print(comparisons.terminal_table(comparison))
    for line in (comparisons.summarize_comparison(comparison), *comparison.notes):
        console.print(line, markup=False)


@app.command()
def collect(
    directories: Annotated[list[Path], typer.Argument(help="folders of runs")],
    table: Annotated[Path, typer.Option(help="the CSV file to append to", callback=check_file)] = Path(
        "docs/results/cells.csv"
    ),
) -> None:
    """Append every finished cell of runs to one CSV of all cells ever measured; those in it already are skipped."""
    from experiments.report.collect import append_cells

    with clean_errors():
        for directory in directories:
            added = append_cells(directory, table)
            console.print(f"{added} cells of {directory} added to {table}.", soft_wrap=True)
