"""`mixlab list`, `check` and `structure`: the mixers themselves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from experiments.cli.app import Out, Plugins, app, clean_errors, console, load_plugins, progress

if TYPE_CHECKING:
    from mixers.registry import MixerEntry


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="wildcard pattern")] = "*",
    plugins: Plugins = [],  # noqa: B006 - typer reads the default and never changes it
) -> None:
    """List the mixers with what they offer, and the ready-made grids."""
    from experiments.ablation.grid import list_grids
    from mixers import list_mixers, registry
    from mixers.traits import CAUSALITIES

    load_plugins(plugins)
    names = list_mixers(pattern)
    table = Table(Column("mixer", no_wrap=True), "causal", "bidir.", "non-c.", "normal.", "as published")
    for name in names:
        entry = registry.get_mixer_entry(name)
        offered = [_offer(c, entry.causalities, entry.default_causality) for c in CAUSALITIES]
        normal = sorted(entry.normalizations, key=lambda n: n != entry.default_normalize)
        table.add_row(name, *offered, " / ".join("yes" if n else "no" for n in normal), _promises(entry))
    console.print(table)
    console.print("● as published  ○ offered  – refused, and `create_mixer` says why", soft_wrap=True)
    if len(names) <= 3:
        for name in names:
            console.print(f"[bold]{name}[/]: {registry.get_mixer_entry(name).summary}", soft_wrap=True, highlight=False)
    console.print(f"Grids: {', '.join(list_grids())}")


@app.command()
def check(
    pattern: Annotated[str, typer.Argument(help="wildcard pattern of mixers' names")] = "*",
    plugins: Plugins = [],  # noqa: B006 - typer reads the default and never changes it
    deep: Annotated[bool, typer.Option(help="also run the slow checks on every configuration")] = False,
) -> None:
    """Run the conformance suite on every configuration of the mixers, and print a table of the outcomes."""
    from experiments.cli.conformance import check_mixers, print_results
    from experiments.core.progress import show_progress

    load_plugins(plugins)
    with clean_errors():
        with show_progress(console) as display:
            results = check_mixers(pattern, deep, display.callback("checks"))
        print_results(results, console)
    if any(result.failures for result in results):
        raise typer.Exit(1)


@app.command("structure")
def structure_(
    pattern: Annotated[str, typer.Argument(help="wildcard pattern of mixers' names")] = "*",
    out: Out = Path("runs/structure"),
    scanned: Annotated[str | None, typer.Option(help="show the scan orders by this mixer, with decay")] = None,
    plugins: Plugins = [],  # noqa: B006
) -> None:
    """Look at mixers as matrices: ranks, row sums, triangularity, receptive fields; a table and figures."""
    from experiments.studies.structure import decaying, draw, records

    load_plugins(plugins)
    with clean_errors(), progress() as display:
        found = records(pattern, lambda n, of, what: display.update("matrices", n, of, what))
        paths = draw(found, out, scanned or decaying(found))
    columns = ("mixer", "causality", "rank", "below", "above", "row sums", "radius")
    table = Table(*(Column(name, no_wrap=True) for name in columns), pad_edge=False, padding=(0, 0))
    for r in found:
        least, most = (f"{bound:.3g}" for bound in (r.matrix.sum(-1).min(), r.matrix.sum(-1).max()))
        spread = least if least == most else f"{least} … {most}"
        table.add_row(r.mixer, r.causality, str(r.rank), str(r.lower), str(r.upper), spread, f"{r.radius:.2f}")
    console.print(table)
    console.print("below, above: the largest rank of a block on that side of the diagonal", soft_wrap=True)
    console.print(f"Figures: {', '.join(path.name for path in paths)} in {out.resolve()}", soft_wrap=True)


def _offer(value: str, offered: tuple[str, ...], default: str) -> str:
    return "–" if value not in offered else "●" if value == default else "○"


def _promises(entry: MixerEntry) -> str:
    """What the published form promises; a mixer that cannot be built must not take the list away."""
    try:
        return entry.trait_summary
    except Exception:
        return "[red]broken[/]: see mixlab check"
