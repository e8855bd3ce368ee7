"""`mixlab distill` and `mixlab teacher`: trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import TaskID

from experiments.cli.app import Out, Plugins, Settings, app, clean_errors, console, load, progress

teacher_app = typer.Typer(no_args_is_help=True, help="The embedded teacher.")
app.add_typer(teacher_app, name="teacher")


@app.command()
def distill(
    recipe: Annotated[str, typer.Argument(help="a ready-made recipe's name, or a .yaml file")],
    out: Annotated[
        Path | None, typer.Option("--out", help="folder that receives everything; default: runs/distill/<recipe>")
    ] = None,
    settings: Settings = [],  # noqa: B006 - typer reads the default and never changes it
    plugins: Plugins = [],  # noqa: B006
) -> None:
    """Distill a mixer into a teacher, stage by stage, as a recipe says. Start it again after a stop: it goes on."""
    from experiments.distill.recipe import load_recipe
    from experiments.distill.run import run_recipe
    from experiments.training.processes import this_process

    console.quiet = not this_process().is_main_process  # of several, one tells
    load(plugins)
    with clean_errors():
        plan = load_recipe(recipe, settings)
        console.print(f"[bold]{plan.name}[/]: {plan.about}")
        batches = {stage.name: stage.fit.batch_size for stage in plan.distillation.stages}
        with progress() as bars:
            tasks: dict[str, TaskID] = {}

            def show(stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=steps)
                speed = next(task.speed for task in bars.tasks if task.id == tasks[stage])
                told = told_losses(stage, losses, speed and speed * batches[stage], console.width)
                bars.update(tasks[stage], completed=step, description=told)

            card = run_recipe(plan, out or Path("runs/distill") / plan.name, show)
    console.print(f"Card: {card.resolve()}", soft_wrap=True)


def told_losses(stage: str, losses: dict[str, float], speed: float | None, width: int) -> str:
    """The loss; where the terminal is wide enough, its terms and the pictures a second as well."""
    told = f"{stage}: loss {losses['loss']:.3g}"
    terms = ", ".join(f"{name} {value:.2g}" for name, value in losses.items() if name != "loss")
    more = [f" ({terms})" if len(losses) > 2 else "", f" · {speed:.3g} images/s" if speed else ""]
    return told + "".join(more) if width >= len(told) + sum(map(len, more)) + 50 else told + more[1]


@teacher_app.command("train")
def teacher_train(
    out: Out = Path("runs/teacher"),
    share: Annotated[float, typer.Option(min=0.0, help="run this share of every stage's steps")] = 1.0,
) -> None:
    """Train the embedded teacher from nothing, or go on where it stopped."""
    from experiments.teacher.card import write_card
    from experiments.teacher.recipe import TeacherRecipe
    from experiments.teacher.train import train_teacher

    with clean_errors():
        recipe = TeacherRecipe().scaled(share)
        with progress() as bars:
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

    with clean_errors():
        console.print(f"Card: {write_card(folder or EMBEDDED, TeacherRecipe()).resolve()}", soft_wrap=True)
