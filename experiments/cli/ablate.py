"""`mixlab ablate`, `status` and `report`: experiments from grid to page."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from experiments.cli.app import Plugins, Settings, app, clean_errors, console, load_plugins, progress
from experiments.core.progress import ProgressDisplay

if TYPE_CHECKING:
    from experiments.ablation.spread import Spread
    from experiments.config import Grid


@app.command()
def ablate(
    grid: Annotated[str, typer.Argument(help="a ready-made grid's name, or a .py file that exposes GRID")],
    out: Annotated[
        Path | None, typer.Option("--out", help="folder that receives everything; default: runs/<the grid's name>")
    ] = None,
    settings: Settings = [],  # noqa: B006 - typer reads the default and never changes it
    plugins: Plugins = [],  # noqa: B006
    only: Annotated[str, typer.Option(help="wildcard pattern: run the variants whose name matches")] = "*",
    seeds: Annotated[int | None, typer.Option(min=1, help="run seeds 0 … N−1 instead of the grid's")] = None,
    teacher: Annotated[str | None, typer.Option(help="'embedded', a folder in diffusers format, or a Hub id")] = None,
    size: Annotated[int | None, typer.Option(min=8, help="side of the training pictures; all sizes scale")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="cells at a time, in processes that share the cores")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="address of a Ray cluster that does the cells; 'auto' finds it")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="time for all of it, as 30m: scales every cell's steps")] = None,
) -> None:
    """Run an ablation and build its report. Start it again after a stop: nothing is lost or done twice."""
    from experiments.ablation import chosen, fit_budget, parse_duration, read_status, run_grid
    from experiments.report import build_report

    load_plugins(plugins)
    with clean_errors():
        seconds = None if budget is None else parse_duration(budget)
        plan = _plan(grid, settings, seeds, teacher, size)
        out = out or Path("runs") / plan.name
        console.print(f"[bold]{plan.name}[/]: {plan.question}")
        spread = _spread(workers, ray, budget)
        kept = None
        with progress() as display:
            show = _show_cells(display)
            if seconds is not None:
                plan, kept = fit_budget(
                    plan, chosen(plan, only), seconds, workers or 1, out, partial(show, 0, 1, "budget")
                )
                console.print(f"Every cell's steps times {kept['factor']:g}, for {budget}.")
            records = run_grid(plan, out, show, only=only, spread=spread, plugins=plugins, budget=kept)
        page = build_report(out)
    failed = [r for r in records if r["status"] == "failed"]
    for record in failed:
        console.print(f"[red]failed[/] {record['cell']}: {escape(record['error'])}", soft_wrap=True)
    if elsewhere := read_status(out).counts["running"]:
        console.print(f"{elsewhere} more cells are being done by another run of this folder: `mixlab status {out}`.")
    console.print(f"Report: {page.resolve()}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _plan(name: str, settings: list[str], seeds: int | None, teacher: str | None, size: int | None) -> Grid:
    from experiments.ablation import load_grid
    from experiments.config import apply_grid_overrides, resize_grid

    plan = load_grid(name)
    plan = apply_grid_overrides(resize_grid(plan, size) if size else plan, settings)
    changes = {"seeds": tuple(range(seeds)) if seeds else plan.seeds, "teacher": teacher or plan.teacher}
    return plan.model_copy(update=changes)


def _spread(workers: int | None, ray: str | None, budget: str | None) -> Spread:
    from experiments.ablation import in_processes, in_turn
    from experiments.ablation.on_ray import on_ray

    if ray and budget and not workers:
        raise ValueError("With --ray a --budget needs --workers: how many cells the cluster does at a time.")
    if ray:
        return partial(on_ray, address=ray, count=workers)
    return partial(in_processes, count=workers) if workers and workers > 1 else in_turn


def _show_cells(display: ProgressDisplay) -> Callable[[int, int, str, str, int, int], None]:
    """Show one task for all cells, and one for each cell that runs."""
    running: set[str] = set()
    completed = 0

    def show(done: int, total: int, label: str, phase: str, step: int, steps: int) -> None:
        nonlocal completed
        if done > completed:  # whichever cell it was: those that still run report again
            for cell in running:
                display.remove(cell)
            running.clear()
            completed = done
        display.update("cells", done, total)
        running.add(label)
        display.update(label, step, steps, f"{label}: {phase}")

    return show


@app.command()
def status(directory: Annotated[Path, typer.Argument(help="a run's folder")]) -> None:
    """Show what of a run is done, running, failed and waiting, and how long is left."""
    from experiments.ablation import read_status
    from experiments.ablation.status import STATES

    with clean_errors():
        found = read_status(directory)
    table = Table("variant", *(Column(state, justify="right") for state in STATES), Column("left", justify="right"))
    for name, label in found.labels.items():
        cells = [cell for cell in found.cells if cell.variant == name]
        counts = [sum(cell.state == state for cell in cells) for state in STATES]
        left = sum(cell.left for cell in cells)
        table.add_row(escape(label), *(str(n) if n else "" for n in counts), _duration(left) if left else "")
    table.add_section()
    table.add_row("all", *map(str, found.counts.values()), _duration(sum(cell.left for cell in found.cells)))
    console.print(table)
    for cell in found.cells:
        if cell.state in ("running", "failed"):
            color, seconds = "red" if cell.state == "failed" else "green", _duration(cell.seconds)
            since = f" for {seconds}" if cell.state == "running" else ""
            console.print(f"[{color}]{cell.state}[/] {cell.id}{since}: {escape(cell.told)}", soft_wrap=True)
    running, waiting = found.counts["running"], found.counts["waiting"]
    if running:
        console.print(f"{_duration(found.left)} left, {running} at a time.")
    elif waiting:
        console.print(f"Nothing is running: start the same command again for the {waiting} cells that wait.")


def _duration(seconds: float) -> str:
    return "?" if math.isnan(seconds) else str(timedelta(seconds=round(seconds)))
