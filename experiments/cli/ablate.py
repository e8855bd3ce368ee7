"""`mixlab ablate` and `status`: run a grid, and inspect a run."""

from __future__ import annotations

import math
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from experiments.cli.app import (
    Plugins,
    Settings,
    WeightVariant,
    app,
    clean_errors,
    console,
    error_console,
    load_plugins,
    print_titled,
    progress,
)
from experiments.cli.option_checks import check_folder
from experiments.core.progress import ProgressDisplay

if TYPE_CHECKING:
    from experiments.ablation.executors import CellExecutor
    from experiments.ablation.run import RunProgressCallback
    from experiments.ablation.status import RunStatus
    from experiments.config import Grid


@app.command()
def ablate(
    grid: Annotated[str, typer.Argument(help="a ready-made grid's name, or a .py file that exposes GRID")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="folder that receives everything; default: runs/<the grid's name>", callback=check_folder
        ),
    ] = None,
    settings: Settings = [],  # noqa: B006 - typer reads the default and never changes it
    plugins: Plugins = [],  # noqa: B006
    only: Annotated[
        list[str], typer.Option(help="wildcard pattern: run the variants whose name matches; repeat as needed")
    ] = ["*"],  # noqa: B006
    seeds: Annotated[int | None, typer.Option(min=1, help="run seeds 0 … N−1 instead of the grid's")] = None,
    teacher: Annotated[str | None, typer.Option(help="'embedded', a folder in diffusers format, or a Hub id")] = None,
    variant: WeightVariant = None,
    size: Annotated[int | None, typer.Option(min=8, help="side of the training images; all sizes scale")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="cells at a time, in processes that share the cores")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="address of a Ray cluster that runs the cells; 'auto' finds it")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="time for the whole run, as 30m: scales every cell's steps")
    ] = None,
) -> None:
    """Run an ablation and build its report. After an interruption, start it again: it resumes and repeats nothing."""
    from experiments.ablation.budget import fit_budget, parse_duration
    from experiments.ablation.run import run_grid, select_cells
    from experiments.ablation.status import read_status
    from experiments.report import build_report

    load_plugins(plugins)
    with clean_errors():
        seconds = None if budget is None else parse_duration(budget)
        plan = _load_grid(grid, settings, seeds, teacher, variant, size)
        out = out or Path("runs") / plan.name
        print_titled(plan.name, plan.question)
        executor = _executor(workers, ray, budget)
        used_budget = None
        with progress() as display:
            show = _show_cells(display)
            if seconds is not None:
                cells = select_cells(plan, only)
                plan, used_budget = fit_budget(plan, cells, seconds, workers or 1, out, partial(show, 0, 1, "budget"))
                console.print(f"Training steps of every cell × {used_budget.factor:g}, for a budget of {budget}.")
            results = run_grid(plan, out, show, only=only, executor=executor, plugins=plugins, budget=used_budget)
        page = build_report(out)
    failed = [result for result in results if result.status == "failed"]
    for result in failed:
        print_titled(f"failed {result.cell}", str(result.error), "red", to=error_console)
    if elsewhere := read_status(out).counts["running"]:
        console.print(f"Another run of this folder works on {elsewhere} more cells: `mixlab status {out}`.")
    console.print(f"Report: {page.resolve()}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def status(directory: Annotated[Path, typer.Argument(help="a run's folder")]) -> None:
    """Show which cells of a run are done, running, failed and waiting, and the time left."""
    from experiments.ablation.status import read_status

    with clean_errors():
        run = read_status(directory)
    console.print(_status_table(run))
    for cell in run.cells:
        if cell.state in ("running", "failed"):
            color = "red" if cell.state == "failed" else "green"
            since = f" for {_format_duration(cell.seconds)}" if cell.state == "running" else ""
            line = Text.assemble((cell.state, color), f" {cell.id}{since}: {cell.message}")
            console.print(line, soft_wrap=True)
    running = run.counts["running"]
    waiting = run.counts["waiting"]
    if running:
        console.print(f"{_format_duration(run.seconds_left)} left, {running} at a time.")
    elif waiting:
        console.print(f"Nothing is running: start the same command again for the {waiting} cells that wait.")


def _load_grid(
    name: str,
    settings: list[str],
    seeds: int | None,
    teacher: str | None,
    variant: str | None,
    size: int | None,
) -> Grid:
    from experiments.ablation import load_grid
    from experiments.config import apply_grid_overrides, resize_grid

    plan = load_grid(name)
    plan = apply_grid_overrides(resize_grid(plan, size) if size else plan, settings)
    changes = {
        "seeds": tuple(range(seeds)) if seeds else plan.seeds,
        "teacher": teacher or plan.teacher,
        "teacher_variant": variant or plan.teacher_variant,
    }
    return plan.model_copy(update=changes)


def _executor(workers: int | None, ray: str | None, budget: str | None) -> CellExecutor:
    from experiments.ablation.executors import run_in_processes, run_serially
    from experiments.ablation.ray_executor import run_on_ray

    if ray and budget and not workers:
        raise ValueError("With --ray, --budget needs --workers: how many cells the cluster runs at a time.")
    if ray:
        return partial(run_on_ray, address=ray, count=workers)
    return partial(run_in_processes, count=workers) if workers and workers > 1 else run_serially


def _show_cells(display: ProgressDisplay) -> RunProgressCallback:
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


def _status_table(run: RunStatus) -> Table:
    from experiments.ablation.status import STATES

    table = Table("variant", *(Column(state, justify="right") for state in STATES), Column("left", justify="right"))
    for name, label in run.labels.items():
        cells = [cell for cell in run.cells if cell.variant == name]
        counts = [sum(cell.state == state for cell in cells) for state in STATES]
        left = sum(cell.seconds_left for cell in cells)
        table.add_row(label, *(str(n) if n else "" for n in counts), _format_duration(left) if left else "")
    table.add_section()
    total = sum(cell.seconds_left for cell in run.cells)
    table.add_row("all", *map(str, run.counts.values()), _format_duration(total))
    return table


def _format_duration(seconds: float) -> str:
    return "?" if math.isnan(seconds) else str(timedelta(seconds=round(seconds)))
