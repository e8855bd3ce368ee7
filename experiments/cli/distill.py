"""`mixlab distill` and `mixlab teacher`: trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments.cli.app import (
    Plugins,
    Settings,
    WeightVariant,
    app,
    clean_errors,
    console,
    load_plugins,
    print_titled,
    progress,
)
from experiments.cli.option_checks import check_folder


@app.command()
def distill(
    recipe: Annotated[str, typer.Argument(help="a ready-made recipe's name, or a .yaml file")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="folder that receives everything; default: runs/distill/<recipe>", callback=check_folder
        ),
    ] = None,
    settings: Settings = [],  # noqa: B006 - typer reads the default and never changes it
    plugins: Plugins = [],  # noqa: B006
    variant: WeightVariant = None,
) -> None:
    """Distill a mixer into a teacher, stage by stage, as a recipe says. Run it again after a stop to continue."""
    from experiments.distill.recipe import load_recipe
    from experiments.distill.run import run_recipe
    from experiments.training.processes import this_process

    console.quiet = not this_process().is_main_process
    load_plugins(plugins)
    with clean_errors():
        plan = load_recipe(recipe, settings)
        plan = plan.model_copy(update={"teacher_variant": variant or plan.teacher_variant})
        print_titled(plan.name, plan.about)
        batch_sizes = {stage.name: stage.fit.batch_size for stage in plan.distillation.stages}
        with progress() as display:

            def after_step(stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
                speed = display.speed(stage)
                images = None if speed is None else speed * batch_sizes[stage]
                display.update(stage, step, steps, describe_losses(stage, losses, images, console.width))

            card = run_recipe(plan, out or Path("runs/distill") / plan.name, after_step)
    console.print(f"Card: {card.resolve()}", soft_wrap=True)


def describe_losses(stage: str, losses: dict[str, float], speed: float | None, width: int) -> str:
    """Describe a stage by its loss and its speed in images a second, and by the loss's terms if the width allows it."""
    text = f"{stage}: loss {losses['loss']:.3g}"
    terms = ", ".join(f"{name} {value:.2g}" for name, value in losses.items() if name != "loss")
    terms = f" ({terms})" if len(losses) > 2 else ""
    rate = f" · {speed:.3g} images/s" if speed else ""
    bar_width = 50
    return text + terms + rate if width >= len(text + terms + rate) + bar_width else text + rate
