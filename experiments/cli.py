"""`mixlab`: every verb is also a function; this file only parses, shows progress and prints."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

if TYPE_CHECKING:
    from mixers.registry import Entry

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Ablations of linear token mixers for image diffusion."
)
teacher_app = typer.Typer(no_args_is_help=True, help="The embedded teacher.")
app.add_typer(teacher_app, name="teacher")
console = Console()

Out = Annotated[Path, typer.Option("--out", help="folder that receives everything")]
Settings = Annotated[list[str], typer.Option("--set", help="override, as dotted.key=value; repeat as needed")]
Plugins = Annotated[list[Path], typer.Option("--plugin", help="a .py file that registers mixers; repeat as needed")]


def main() -> None:
    """The console script."""
    _quiet()
    app()


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="wildcard pattern")] = "*",
    plugins: Plugins = [],  # noqa: B006 - typer reads the default and never changes it
) -> None:
    """List the mixers with what they offer, and the ready-made grids."""
    from experiments.ablation.grid import list_grids
    from mixers import list_mixers, registry
    from mixers.traits import CAUSALITIES

    _load(plugins)
    names = list_mixers(pattern)
    table = Table(Column("mixer", no_wrap=True), "causal", "bidir.", "non-c.", "normal.", "as published")
    for name in names:
        entry = registry.entry(name)
        offered = [_offer(c, entry.causalities, entry.default_causality) for c in CAUSALITIES]
        normal = sorted(entry.normalizations, key=lambda n: n != entry.default_normalize)
        table.add_row(name, *offered, " / ".join("yes" if n else "no" for n in normal), _promises(entry))
    console.print(table)
    console.print("● as published  ○ offered  – refused, and `create_mixer` says why", soft_wrap=True)
    if len(names) <= 3:
        for name in names:
            console.print(f"[bold]{name}[/]: {registry.entry(name).summary}", soft_wrap=True, highlight=False)
    console.print(f"Grids: {', '.join(list_grids())}")


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

    _load(plugins)
    with _clean_errors():
        plan = override(load_grid(grid), settings)
        changes = {"seeds": tuple(range(seeds)) if seeds else plan.seeds, "teacher": teacher or plan.teacher}
        plan = plan.model_copy(update=changes)
        console.print(f"[bold]{plan.name}[/]: {plan.question}")
        with _bars() as bars:
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
def distill(
    recipe: Annotated[str, typer.Argument(help="a ready-made recipe's name, or a .yaml file")],
    out: Annotated[
        Path | None, typer.Option("--out", help="folder that receives everything; default: runs/distill/<recipe>")
    ] = None,
    settings: Settings = [],  # noqa: B006 - typer reads the default and never changes it
    plugins: Plugins = [],  # noqa: B006
) -> None:
    """Distil a mixer into a teacher, stage by stage, as a recipe says. Start it again after a stop: it goes on."""
    from accelerate import PartialState

    from experiments.distil.recipe import load_recipe
    from experiments.distil.run import run_recipe

    console.quiet = not PartialState().is_main_process  # of several, one tells
    _load(plugins)
    with _clean_errors():
        plan = load_recipe(recipe, settings)
        console.print(f"[bold]{plan.name}[/]: {plan.about}")
        with _bars() as bars:
            tasks: dict[str, TaskID] = {}

            def show(stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=steps)
                bars.update(tasks[stage], completed=step, description=f"{stage}: loss {losses['loss']:.4g}")

            card = run_recipe(plan, out or Path("runs/distill") / plan.name, show)
    console.print(f"Card: {card.resolve()}", soft_wrap=True)


@app.command()
def check(
    pattern: Annotated[str, typer.Argument(help="wildcard pattern of mixers' names")] = "*",
    plugins: Plugins = [],  # noqa: B006 - typer reads the default and never changes it
    deep: Annotated[bool, typer.Option(help="also run the slow checks on every configuration")] = False,
) -> None:
    """Prove that mixers keep their promises: the conformance suite on every configuration, as a table."""
    from experiments.check import check_mixers, show

    _load(plugins)
    with _clean_errors():
        with _bars() as bars:
            task = bars.add_task("checking", total=1)
            results = check_mixers(
                pattern, deep, lambda n, of, what: bars.update(task, completed=n, total=of, description=what)
            )
        show(results, console)
    if any(result.failed for result in results):
        raise typer.Exit(1)


@app.command()
def crossover(
    pattern: Annotated[str, typer.Argument(help="wildcard pattern of mixers' names")] = "*",
    profile: Annotated[str, typer.Option(help="whose sites: embedded, sd15, sd21 or sdxl")] = "embedded",
    dim: Annotated[int | None, typer.Option(min=1, help="width of one kind of site, instead of a profile")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="its number of heads")] = None,
    max_tokens: Annotated[int, typer.Option(help="largest number of tokens")] = 65536,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="turns that the medians are over")] = 7,
    out: Out = Path("runs/crossover"),
    plugins: Plugins = [],  # noqa: B006 - typer reads the default and never changes it
) -> None:
    """Measure from how many tokens on each mixer is as fast as softmax attention here: the `min_tokens` to use."""
    from experiments.bench import crossover as bench

    _load(plugins)
    with _clean_errors():
        kinds = bench.choose_kinds(profile, dim, heads)
        with _bars() as bars:
            task = bars.add_task("starting", total=1)
            result = bench.measure_crossovers(
                pattern,
                kinds,
                max_tokens=max_tokens,
                dtype=dtype,
                device=device,
                repeats=repeats,
                report=lambda n, of, what: bars.update(task, completed=n, total=of, description=what),
            )
        record = bench.save(result, out)
        bench.draw(result, out / "crossover.png")
    bench.show(result, console)
    console.print(f"\nRecord and figure: {record.parent.resolve()}", soft_wrap=True)


@app.command()
def bench(
    verb: Annotated[str | None, typer.Argument(help="operators, layers, unet, memory or crossover")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="rewrite this machine's table of backends")] = False,
    table: Annotated[Path | None, typer.Option(help="of --calibrate; default: where `auto` looks")] = None,
    against: Annotated[str, typer.Option(help="only baselines whose name matches this pattern")] = "*",
    out: Out = Path("runs/bench"),
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="of torch on a CPU")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="turns; medians are over these")] = 7,
    budget: Annotated[float, typer.Option(min=1, help="seconds for all of it, about")] = 1800,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="the ladder ends here")] = None,
    heads: Annotated[str | None, typer.Option(help="heads x width, as in 8x40,8x80")] = None,
    batch: Annotated[int | None, typer.Option(min=1)] = None,
    profile: Annotated[str, typer.Option(help="of unet: embedded, sd15, sd21 or sdxl")] = "embedded",
    mixer: Annotated[str | None, typer.Option(help="of unet; default: LinFusion")] = None,
    min_tokens: Annotated[int, typer.Option(min=1, help="of unet's hybrid")] = 512,
    sizes: Annotated[list[int] | None, typer.Option("--size", help="of unet: sides in pixels; repeat")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="tiny sizes, to see that it runs")] = False,
) -> None:
    """Measure what mixers cost here: against others' implementations, and against what the machine can do."""
    import torch

    from experiments.bench import commands
    from experiments.bench.contest import Limits

    with _clean_errors():
        if threads is not None:
            torch.set_num_threads(threads)
        setup = commands.make_setup(device, dtype, quick, max_tokens, heads, batch)
        limits = Limits(1 if quick else repeats, budget=budget)
        if calibrate and quick and table is None:
            raise ValueError("--quick measures next to nothing: give the table a --table of its own.")
        if calibrate:
            commands.calibrate(setup, table, console, _bars, (16, 64) if quick else commands.LADDER)
        elif verb == "crossover":
            crossover(max_tokens=max_tokens or 65536, dtype=dtype, device=device, repeats=repeats, out=out)
        elif verb is None:
            raise ValueError(f"Expected a benchmark: {', '.join((*commands.VERBS, 'crossover'))}; or --calibrate.")
        else:
            sides = tuple(sizes or commands.SIZES[: 1 if quick else None])
            chosen = {"profile": profile, "mixer": mixer or commands.MOUNTED, "min_tokens": min_tokens, "sizes": sides}
            commands.bench(verb, out, against, setup, limits, chosen, console, _bars)


@app.command("structure")
def structure_(
    pattern: Annotated[str, typer.Argument(help="wildcard pattern of mixers' names")] = "*",
    out: Out = Path("runs/structure"),
    scanned: Annotated[str | None, typer.Option(help="show the scan orders by this mixer, with decay")] = None,
    plugins: Plugins = [],  # noqa: B006
) -> None:
    """Look at mixers as matrices: ranks, row sums, triangularity, receptive fields; a table and figures."""
    from experiments.structure import decaying, draw, records

    _load(plugins)
    with _clean_errors(), _bars() as bars:
        task = bars.add_task("matrices", total=1)
        found = records(pattern, lambda n, of, what: bars.update(task, completed=n, total=of, description=what))
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


@app.command()
def compatibility(
    out: Out = Path("runs/compatibility"),
    share: Annotated[float, typer.Option("--steps-share", min=0.0, help="train for this share of the steps")] = 1.0,
) -> None:
    """Measure whether a ControlNet and an IP-Adapter made for softmax attention work under a distilled student."""
    from experiments.compatibility import default_plan, run_compatibility, show, write_page

    with _clean_errors():
        with _bars() as bars:
            task = bars.add_task("starting", total=1)
            record = run_compatibility(
                out,
                default_plan(share),
                lambda what, n, of: bars.update(task, description=what, completed=n, total=of),
            )
        page = write_page(out, out / "compatibility.md")
    show(record, console)
    console.print(f"Page: {page.resolve()}", soft_wrap=True)


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="a run's folder")]) -> None:
    """Build the report of a run again, from its files alone."""
    from experiments.report import build_report

    with _clean_errors():
        console.print(f"Report: {build_report(directory).resolve()}", soft_wrap=True)


@teacher_app.command("train")
def teacher_train(
    out: Out = Path("runs/teacher"),
    share: Annotated[float, typer.Option(min=0.0, help="run this share of every stage's steps")] = 1.0,
) -> None:
    """Train the embedded teacher from nothing, or go on where it stopped."""
    from experiments.teacher.card import write_card
    from experiments.teacher.recipe import TeacherRecipe
    from experiments.teacher.train import train_teacher

    with _clean_errors():
        recipe = TeacherRecipe().scaled(share)
        with _bars() as bars:
            tasks: dict[str, TaskID] = {}

            def show(stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=steps)
                bars.update(tasks[stage], completed=step, description=f"{stage}: loss {losses['loss']:.4f}")

            folder = train_teacher(out, recipe, show)
        console.print("Measuring for the model card …")
        write_card(folder, recipe)
    console.print(f"Teacher: {folder.resolve()}", soft_wrap=True)


@teacher_app.command("card")
def teacher_card(
    folder: Annotated[Path | None, typer.Argument(help="a pipeline's folder; default: the embedded one")] = None,
) -> None:
    """Measure a teacher and write its model card and sample sheet again."""
    from experiments.teacher.card import write_card
    from experiments.teacher.load import EMBEDDED
    from experiments.teacher.recipe import TeacherRecipe

    with _clean_errors():
        console.print(f"Card: {write_card(folder or EMBEDDED, TeacherRecipe()).resolve()}", soft_wrap=True)


def _offer(value: str, offered: tuple[str, ...], default: str) -> str:
    return "–" if value not in offered else "●" if value == default else "○"


def _promises(entry: Entry) -> str:
    """What the published form promises; a mixer that cannot be built must not take the list away."""
    try:
        return entry.promises
    except Exception:
        return "[red]broken[/]: see mixlab check"


def _load(plugins: list[Path]) -> None:
    from mixers.registry import load_plugin

    with _clean_errors():
        for path in plugins:
            load_plugin(path)


@contextmanager
def _bars() -> Iterator[Progress]:
    columns = (TextColumn("{task.description:<48}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console) as bars:
        yield bars


@contextmanager
def _clean_errors() -> Iterator[None]:
    """What a user can mend is one sentence, not a traceback."""
    try:
        yield
    except (ValueError, FloatingPointError, OSError, ModuleNotFoundError) as error:
        console.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print("Stopped. Start the same command again to go on.")
        raise typer.Exit(130) from None


def _quiet() -> None:
    """Libraries' start-up chatter is not ours to show."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
