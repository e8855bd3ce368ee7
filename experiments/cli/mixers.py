"""`mixlab list`, `check` and `structure`: what mixers exist, whether they conform, and what their matrices are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from experiments.cli.app import Out, Plugins, app, clean_errors, console, load_plugins, print_titled, progress

if TYPE_CHECKING:
    from experiments.studies.structure import MatrixAnalysis
    from mixers.registry import MixerEntry


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="wildcard pattern")] = "*",
    plugins: Plugins = [],  # noqa: B006 - typer reads the default and never changes it
    metrics: Annotated[bool, typer.Option("--metrics", help="list the metrics of an evaluation instead")] = False,
    objectives: Annotated[bool, typer.Option("--objectives", help="list the objectives of a distillation")] = False,
) -> None:
    """List the mixers with the switches that they offer, and the ready-made grids; or the metrics or objectives."""
    from experiments.ablation.grid import list_grids
    from mixers import list_mixers, registry
    from mixers.traits import CAUSALITIES

    load_plugins(plugins)
    if metrics:
        _list_metrics(pattern)
        return
    if objectives:
        _list_objectives(pattern)
        return
    names = list_mixers(pattern)
    table = Table(Column("mixer", no_wrap=True), "causal", "bidir.", "non-c.", "normal.", "as published")
    for name in names:
        entry = registry.get_mixer_entry(name)
        offered = [_format_offer(c, entry.causalities, entry.default_causality) for c in CAUSALITIES]
        normal = sorted(entry.normalizations, key=lambda n: n != entry.default_normalize)
        table.add_row(name, *offered, " / ".join("yes" if n else "no" for n in normal), _format_promises(entry))
    console.print(table)
    console.print("● as published  ○ offered  – refused, and `create_mixer` says why", soft_wrap=True)
    if len(names) <= 3:
        for name in names:
            print_titled(name, registry.get_mixer_entry(name).summary)
    console.print(f"Grids: {', '.join(list_grids())}")


def _list_metrics(pattern: str) -> None:
    from experiments.metrics import list_metrics, metric_class

    for name in list_metrics(pattern):
        print_titled(name, metric_class(name).summary())


def _list_objectives(pattern: str) -> None:
    import inspect

    from experiments.core.registries import OBJECTIVES

    for name in OBJECTIVES.names(pattern):
        summary = (inspect.getdoc(OBJECTIVES.get(name)) or "").partition("\n\n")[0].replace("\n", " ")
        print_titled(name, summary)


@app.command()
def check(
    pattern: Annotated[str, typer.Argument(help="wildcard pattern of mixers' names")] = "*",
    plugins: Plugins = [],  # noqa: B006 - typer reads the default and never changes it
    deep: Annotated[bool, typer.Option(help="also run the slow checks on every configuration")] = False,
) -> None:
    """Run the conformance suite on every configuration of the mixers, and print a table of the outcomes."""
    from experiments.cli.conformance import check_mixers, print_results

    load_plugins(plugins)
    with clean_errors():
        with progress() as display:
            results = check_mixers(pattern, deep, display.callback("checks"))
        print_results(results, console)
    if any(result.failures for result in results):
        raise typer.Exit(1)


@app.command("structure")
def structure_(
    pattern: Annotated[str, typer.Argument(help="wildcard pattern of mixers' names")] = "*",
    out: Out = Path("runs/structure"),
    scan_mixer: Annotated[str | None, typer.Option(help="the mixer that shows the scan orders; needs a decay")] = None,
    plugins: Plugins = [],  # noqa: B006
) -> None:
    """Analyze mixers as matrices: ranks, row sums, triangularity, receptive fields; a table and figures."""
    from experiments.studies.structure import analyze_mixers, choose_scan_mixer, draw_figures

    load_plugins(plugins)
    with clean_errors(), progress() as display:
        analyses = analyze_mixers(pattern, display.callback("matrices"))
        paths = draw_figures(analyses, out, scan_mixer or choose_scan_mixer(analyses))
    columns = ("mixer", "causality", "rank", "below", "above", "row sums", "radius")
    table = Table(*(Column(name, no_wrap=True) for name in columns), pad_edge=False, padding=(0, 0))
    for analysis in analyses:
        table.add_row(*_structure_row(analysis))
    console.print(table)
    console.print("below, above: the largest rank of a block on that side of the diagonal", soft_wrap=True)
    console.print(f"Figures: {', '.join(path.name for path in paths)} in {out.resolve()}", soft_wrap=True)


def _structure_row(analysis: MatrixAnalysis) -> tuple[str, ...]:
    sums = analysis.matrix.sum(-1)
    lowest = f"{sums.min():.3g}"
    highest = f"{sums.max():.3g}"
    return (
        analysis.mixer,
        analysis.causality,
        str(analysis.rank),
        str(analysis.lower_rank),
        str(analysis.upper_rank),
        lowest if lowest == highest else f"{lowest} … {highest}",
        f"{analysis.radius:.2f}",
    )


def _format_offer(value: str, offered: tuple[str, ...], default: str) -> str:
    return "–" if value not in offered else "●" if value == default else "○"


def _format_promises(entry: MixerEntry) -> str | Text:
    """Return what the published form promises; a mixer that cannot be built must not break the list."""
    try:
        return entry.trait_summary
    except Exception:
        return Text.assemble(("broken", "red"), ": see mixlab check")
