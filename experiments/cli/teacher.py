"""`mixlab teacher`: train, export and measure the embedded teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from experiments.cli.app import app, clean_errors, console, progress
from experiments.cli.option_checks import check_file, check_finite, check_folder

teacher_app = typer.Typer(no_args_is_help=True, help="The embedded teacher.")
app.add_typer(teacher_app, name="teacher")

STATE = Path("/var/tmp/linear-token-mixers/teacher")
Precision = Literal["bf16", "no"]
State = Annotated[Path, typer.Option("--state", help="folder of the training state; it survives a fresh checkout")]


@teacher_app.command("train")
def train(
    state: State = STATE,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    batch_size: Annotated[int | None, typer.Option(min=1, help="of the UNet; default: the recipe's")] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="of the UNet; 'no' is float32, for CPUs that emulate bfloat16")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=1.0, help="wall-clock budget of the UNet in this call", callback=check_finite)
    ] = None,
    share: Annotated[
        float, typer.Option(min=0.0, help="run this share of every stage's steps", callback=check_finite)
    ] = 1.0,
    stage: Annotated[list[str], typer.Option(help="decoder, judge or unet; repeat as needed; default: all")] = [],  # noqa: B006
) -> None:
    """Train the embedded teacher, or resume. SIGTERM saves the state; the same command resumes.

    A state belongs to one recipe: give trials with --share a --state of their own.
    """
    from experiments.teacher.recipe import TeacherRecipe
    from experiments.teacher.train import STAGES, train_teacher

    with clean_errors():
        recipe = TeacherRecipe().scaled(share).with_batch_size(batch_size).with_precision(precision)
        with progress() as bars:

            def show(stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
                bars.update(stage, step, steps, f"{stage}: loss {losses['loss']:.4f}")

            train_teacher(state / "state", recipe, show, device=device, seconds=seconds, stages=tuple(stage) or STAGES)


@teacher_app.command("decay")
def decay(
    state: State = STATE,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    steps: Annotated[int | None, typer.Option(min=1, help="default: the recipe's")] = None,
    precision: Annotated[Precision | None, typer.Option(help="as of `mixlab teacher train`")] = None,
) -> None:
    """Let the learning rate of a copy of the newest state fall to a tenth, before an export with `--stage decay`."""
    from experiments.teacher.decay import decay_learning_rate
    from experiments.teacher.recipe import TeacherRecipe

    with clean_errors(), progress() as bars:
        recipe = TeacherRecipe().with_precision(precision)
        recipe = recipe.model_copy(update={"decay": steps or recipe.decay})

        def show(stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
            bars.update(stage, step, steps, f"{stage}: loss {losses['loss']:.4f}")

        decay_learning_rate(state / "state", recipe, show, device=device)


@teacher_app.command("restore")
def restore(
    export: Annotated[Path, typer.Argument(help="folder that `mixlab teacher export` wrote", callback=check_folder)],
    state: State = STATE,
) -> None:
    """Make a training state of an exported teacher, to train it further where its own state is lost."""
    from experiments.teacher.recipe import TeacherRecipe
    from experiments.teacher.restore import restore_state

    with clean_errors():
        step = restore_state(state / "state", export, TeacherRecipe())
    console.print(
        f"State at step {step}: {state / 'state'}. Continue with: mixlab teacher train --state {state}", soft_wrap=True
    )


@teacher_app.command("imitate")
def imitate(
    state: State = STATE,
    stage: Annotated[str, typer.Option(help="of the UNet that is imitated: unet, or decay")] = "decay",
) -> None:
    """Train the tiny PixArt on the UNet's predictions, or resume. SIGTERM saves the state; the same command resumes."""
    from experiments.teacher.recipe import TeacherRecipe
    from experiments.teacher.transformer import train_transformer

    with clean_errors(), progress() as bars:
        recipe = TeacherRecipe()

        def show(step: int, losses: dict[str, float]) -> None:
            bars.update("transformer", step, recipe.dit.steps, f"transformer: loss {losses['loss']:.4f}")

        train_transformer(state / "state", recipe, show, stage=stage)


@teacher_app.command("sheet")
def sheet(
    path: Annotated[Path, typer.Argument(help="the PNG to write", callback=check_file)],
    state: State = STATE,
    stage: Annotated[
        str, typer.Option(help="unet, decay: the copy whose learning rate has decayed, or transformer")
    ] = "unet",
    size: Annotated[int, typer.Option(min=32, help="pixels")] = 64,
    count: Annotated[int, typer.Option(min=1, help="samples")] = 40,
) -> None:
    """Draw a sheet of unpicked samples from the newest training state."""
    from experiments.teacher.export import load_trained
    from experiments.teacher.recipe import TeacherRecipe
    from experiments.teacher.samples import write_sheet
    from experiments.teacher.transformer import FOLDER, load_trained_transformer

    with clean_errors():
        recipe = TeacherRecipe()
        directory = state / "state"
        pipe, step = (
            load_trained_transformer(directory, recipe) if stage == FOLDER else load_trained(directory, recipe, stage)
        )
        captions = write_sheet(pipe, path, count, size)
    console.print(f"Step {step}: {path.resolve()}", soft_wrap=True)
    for number, caption in enumerate(captions):
        console.print(f"{number:3d}  {caption}", highlight=False)


@teacher_app.command("export")
def export(
    folder: Annotated[
        Path, typer.Argument(help="receives the pipeline, its card, its numbers and its sheet", callback=check_folder)
    ],
    state: State = STATE,
    stage: Annotated[str, typer.Option(help="unet, or decay")] = "unet",
) -> None:
    """Write the newest training state as a pipeline in half precision, with the judge, measured, and a model card."""
    from experiments.teacher.card import write_card
    from experiments.teacher.export import export_state
    from experiments.teacher.recipe import TeacherRecipe

    with clean_errors():
        export_state(folder, state / "state", TeacherRecipe(), stage)
        console.print("Measuring for the model card …")
        console.print(f"Card: {write_card(folder, TeacherRecipe()).resolve()}", soft_wrap=True)


@teacher_app.command("card")
def card(
    folder: Annotated[Path | None, typer.Argument(help="a pipeline's folder; default: the embedded one")] = None,
) -> None:
    """Measure a teacher and write its model card and sample sheet again."""
    from experiments.teacher.card import write_card
    from experiments.teacher.load import EMBEDDED
    from experiments.teacher.recipe import TeacherRecipe

    with clean_errors():
        console.print(f"Card: {write_card(folder or EMBEDDED, TeacherRecipe()).resolve()}", soft_wrap=True)
