"""A teacher's training state: whose recipe it is, and stages that one training at a time works on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from experiments.config import FitConfig
from experiments.core.files import require_same_inputs, save_folder, write_json
from experiments.core.locks import lock_folder
from experiments.teacher.recipe import TeacherRecipe
from experiments.training import LossCallback, fit
from experiments.training.processes import this_process

RUN = "run.json"


def require_same_state(directory: Path, recipe: TeacherRecipe, stages: tuple[str, ...]) -> None:
    """Refuse to continue a state of another recipe, and write which one a new state is of.

    A state that does not say it is accepted, unless a finished stage of it has more steps than the recipe's.

    Args:
        directory: the state.
        recipe: of this training.
        stages: names of the recipe's fields whose stages this training uses, beside the autoencoder.

    Raises:
        ValueError: the state is of another architecture, or of other settings of the autoencoder or these stages.
    """
    identity = recipe.identity()
    used = {name: identity[name] for name in ("architecture", "vae", *stages)}
    if require_same_inputs(directory / RUN, used, option="--state"):
        return
    for stage in ("vae", "decoder", "judge"):
        steps: int = getattr(recipe, stage).steps
        completed = max(map(checkpoint_step, checkpoint_files(directory / stage)), default=0)
        if completed > steps:
            raise ValueError(
                f"Cannot continue in {directory}: its stage {stage} has {completed} steps, and this recipe has only "
                f"{steps}. Give another --state."
            )
    if this_process().is_main_process:
        write_json(directory / RUN, identity)


@contextmanager
def lock_stage(folder: Path) -> Iterator[None]:
    """Hold the folder of a stage; among processes that train it together, the main one holds it.

    Raises:
        ValueError: another training holds it.
    """
    if not this_process().is_main_process:
        yield
        return
    with lock_folder(folder, "training of the teacher"):
        yield


def fit_stage(
    model: nn.Module,
    batch: Callable[[int], Any],
    config: FitConfig,
    folder: Path,
    callback: LossCallback | None = None,
) -> None:
    """Train a stage by `fit`, or resume it, while its folder is locked.

    Processes that train together return when the main one has written the last checkpoint.
    """
    with lock_stage(folder):
        fit(model, batch, config, folder, callback)
    this_process().wait_for_everyone()


def save_once(folder: Path, save: Callable[[Path], Any]) -> None:
    """Let the main process fill a folder that appears as a whole, and the others wait for it."""
    process = this_process()
    if process.is_main_process:
        save_folder(folder, save)
    process.wait_for_everyone()


def checkpoint_files(directory: Path) -> list[Path]:
    """Return the files of a training's checkpoints, the newest last."""
    return sorted((directory / "checkpoints").glob("step-*.safetensors"))


def newest_checkpoint(directory: Path) -> Path:
    """Return the file of the newest checkpoint of a training.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = checkpoint_files(directory)
    if not paths:
        raise FileNotFoundError(f"No checkpoint in {directory / 'checkpoints'}: train first.")
    return paths[-1]


def checkpoint_step(path: Path) -> int:
    """Return the number of steps behind a checkpoint, from its file name."""
    return int(path.name.removeprefix("step-").removesuffix(".safetensors"))
