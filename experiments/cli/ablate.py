"""`mixlab ablate`, `report` and `compatibility`: experiments from grid to page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments.cli.app import Out, Plugins, Settings, app, clean_errors, console, load, progress


@app.command()
def ablate(
    grid: Annotated[str, typer.Argument(help="a ready-made grid's name, or a .py file that exposes GRID")],
    out: Out = Path("runs/ablation"),
    settings: Settings = [],  # noqa: B006 - typer reads the default and never changes it
    plugins: Plugins = [],  # noqa: B006
    seeds: Annotated[int | None, typer.Option(min=1, help="run seeds 0 … N−1 instead of the grid's")] = None,
    teacher: Annotated[str | None, typer.Option(help="'embedded', a folder in diffusers format, or a Hub id")] = None,
) -> None:
    """Run an ablation and build its report. Start it again after a stop: nothing is lost or done twice."""
    from experiments.ablation import load_grid, run_grid
    from experiments.config import override
    from experiments.report import build_report

    load(plugins)
    with clean_errors():
        plan = override(load_grid(grid), settings)
        changes = {"seeds": tuple(range(seeds)) if seeds else plan.seeds, "teacher": teacher or plan.teacher}
        plan = plan.model_copy(update=changes)
        console.print(f"[bold]{plan.name}[/]: {plan.question}")
        with progress() as bars:
            cells = bars.add_task("cells", total=len(plan.cells()))
            phase = bars.add_task("starting", total=1)

            def show(done: int, total: int, label: str, what: str, step: int, steps: int) -> None:
                bars.update(cells, completed=done, total=total)
                bars.update(phase, description=f"{label}: {what}", completed=step, total=steps)

            records = run_grid(plan, out, show)
        page = build_report(out)
    failed = [r for r in records if r["status"] == "failed"]
    for record in failed:
        console.print(f"[red]failed[/] {record['cell']}: {record['error']}", soft_wrap=True)
    console.print(f"Report: {page.resolve()}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="a run's folder")]) -> None:
    """Build the report of a run again, from its files alone."""
    from experiments.report import build_report

    with clean_errors():
        console.print(f"Report: {build_report(directory).resolve()}", soft_wrap=True)


@app.command()
def compatibility(
    out: Out = Path("runs/compatibility"),
    share: Annotated[float, typer.Option("--steps-share", min=0.0, help="train for this share of the steps")] = 1.0,
) -> None:
    """Measure whether a ControlNet and an IP-Adapter made for softmax attention work under a distilled student."""
    from experiments.compatibility import default_plan, run_compatibility, show, write_page

    with clean_errors():
        with progress() as bars:
            task = bars.add_task("starting", total=1)
            record = run_compatibility(
                out,
                default_plan(share),
                lambda what, n, of: bars.update(task, description=what, completed=n, total=of),
            )
        page = write_page(out, out / "compatibility.md")
    show(record, console)
    console.print(f"Page: {page.resolve()}", soft_wrap=True)
