"""The end of an open-ended training: a copy of its state, whose learning rate falls, for an export."""

from __future__ import annotations

import shutil
from pathlib import Path

from experiments.core.devices import check_device
from experiments.teacher.objectives import JointDenoising
from experiments.teacher.recipe import TeacherRecipe
from experiments.teacher.state import checkpoint_step, lock_stage, newest_checkpoint, require_same_state
from experiments.teacher.train import build_denoiser, open_encoder, open_tokenizer, stage_callback, unet_batches
from experiments.training import StageCallback, delete_checkpoints, fit
from experiments.training.processes import agree_on_start, this_process
from experiments.training.schedule import learning_rate_factor


def decay_learning_rate(
    directory: Path,
    recipe: TeacherRecipe,
    report: StageCallback | None = None,
    *,
    device: str = "cpu",
) -> JointDenoising:
    """Train a copy of the newest state while the learning rate falls to a tenth: what an export is made of.

    The copy is in `directory / "decay"` and replaces an earlier one of another step; the open-ended training in
    `directory / "unet"` is not changed. One batch in ten has larger images, whatever `recipe.large_from` says.

    Raises:
        FileNotFoundError: there is no state of the UNet.
        ValueError: there is no such device; the state is of another recipe, or another decay is running in it.
    """
    check_device(device)
    source = newest_checkpoint(directory / "unet")
    folder = directory / "decay"
    this_process()  # connects the processes, which must start from one state
    step = agree_on_start(checkpoint_step(source))
    require_same_state(directory, recipe, ("unet",))
    config = recipe.unet.model_copy(
        update={
            "steps": step + recipe.decay,
            "warmup": step,
            "schedule": "cosine",
            "learning_rate": recipe.unet.learning_rate * learning_rate_factor(step, recipe.unet),
            "ema": recipe.decay_ema,
        }
    )
    coder = open_encoder(directory, recipe, report)
    words = open_tokenizer(directory, recipe)
    model = build_denoiser(words, recipe).to(device)
    batch = unet_batches(directory, coder, words, recipe.model_copy(update={"large_from": 0}), device)
    with lock_stage(folder):
        _copy_state(source, folder)
        fit(model, batch, config, folder, stage_callback(report, "decay", config))
    return model


def _copy_state(source: Path, folder: Path) -> None:
    """Start the stage in `folder` from a checkpoint, unless it has been started from it; the main process does."""
    process = this_process()
    started = folder / f"from-{checkpoint_step(source)}"
    if process.is_main_process and not started.exists():
        delete_checkpoints(folder)
        for path in (folder / "metrics.jsonl", *folder.glob("from-*")):
            path.unlink(missing_ok=True)
        (folder / "checkpoints").mkdir(parents=True)
        for path in (source, source.with_name(source.name + ".sha256")):
            shutil.copy2(path, folder / "checkpoints")
        started.touch()
    process.wait_for_everyone()
