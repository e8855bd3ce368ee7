"""`mixlab distill`: a recipe from teacher to run card. Started again after a stop, it keeps finished stages.

teacher -> encoded data -> adapter -> stages -> adapter/ -> card.md

Under `accelerate launch` every process trains; only the main one writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from experiments.config import FitConfig
from experiments.core.files import read_json, require_same_inputs, write_json
from experiments.core.locks import lock_folder
from experiments.data import open_records
from experiments.data.example import digest_records
from experiments.distill.batches import LatentSource, draw_batch
from experiments.distill.cache import open_cache
from experiments.distill.cache_builder import build_cache
from experiments.distill.card import sample_images, save_image_row, write_card
from experiments.distill.context import encode_images
from experiments.distill.recipe import DistillationRecipe
from experiments.distill.student import build_student, run_stages, seed_stages, training_sources
from experiments.teacher.load import open_teacher
from experiments.teacher.teacher import Batch, Teacher
from experiments.training import StageCallback
from experiments.training.processes import this_process

RUN = "run.json"
SECONDS = "seconds.json"


def run_recipe(recipe: DistillationRecipe, directory: Path, callback: StageCallback) -> Path:
    """Distill as the recipe says; returns the path of the card.

    Args:
        recipe: as `load_recipe` returns it.
        directory: receives run.json, a folder per stage, samples/, adapter/, card.md, card.json and its images.
        callback: called after each step.

    Raises:
        ValueError: another process uses the directory, or it holds a run of another recipe, teacher, data or plug-in
            source; or teacher, data or mixer cannot be used as configured.
        FloatingPointError: a loss is not finite.
    """
    process = this_process()  # selects this process's device
    with lock_folder(directory, "distillation") if process.is_main_process else nullcontext():
        _require_same_run(directory, {"recipe": recipe.model_dump(mode="json")})
        return _run(recipe, directory, callback, process)


def _run(recipe: DistillationRecipe, directory: Path, callback: StageCallback, process: PartialState) -> Path:
    teacher = open_teacher(recipe.teacher, getattr(torch, recipe.dtype), recipe.teacher_variant)
    config = seed_stages(recipe.distillation, recipe.seed)
    inputs = {
        "recipe": recipe.model_dump(mode="json"),
        "teacher": teacher.fingerprint,
        "data": digest_records(open_records(recipe.data, split="train")),
        "plugin_source": training_sources(recipe.mixer.name, config),
    }
    _require_same_run(directory, inputs)
    latents = _open_latents(recipe, teacher, process)
    adapter = build_student(teacher, recipe.mixer.name, recipe.mixer, config, recipe.seed)
    process.wait_for_everyone()
    if process.is_main_process:  # only now, so that a recipe that cannot be opened leaves the folder as it was
        write_json(directory / RUN, inputs)

    def batch(step: int, fit: FitConfig, sizes: tuple[int, ...], caption_dropout: float) -> Batch:
        tensors = draw_batch(latents, step, fit, teacher.train_timesteps, sizes, caption_dropout)
        return {name: tensor.to(teacher.device) for name, tensor in tensors.items()}

    with _stage_clock(directory / SECONDS, process) as count_seconds:

        def after_step(stage: str, completed: int, steps: int, losses: dict[str, float]) -> None:
            if process.is_main_process and recipe.samples.due(completed):
                images = sample_images(teacher, recipe.samples, config.image_size)  # the student is mounted
                save_image_row(images, directory / "samples" / f"{stage}-{completed}.png")
            count_seconds(stage)
            callback(stage, completed, steps, losses)

        records = run_stages(teacher, adapter, config, batch, directory, after_step)
    card = directory / "card.md"
    if process.is_main_process:
        adapter.save_pretrained(directory / "adapter")
        seconds = read_json(directory / SECONDS)
        stages = [{**record, "seconds": seconds.get(record["stage"], 0.0)} for record in records]
        write_card(recipe, teacher, adapter, stages, directory)
    process.wait_for_everyone()
    return card


def _open_latents(recipe: DistillationRecipe, teacher: Teacher, process: PartialState) -> LatentSource:
    """The encoded images: from the recipe's cache, which the main process builds or completes, or in memory."""
    config = recipe.distillation
    if recipe.cache is None:
        return encode_images(teacher, recipe.data, config.all_sizes, config.images)
    folder = Path(recipe.cache)
    if process.is_main_process:
        records = open_records(recipe.data, split="train")
        build_cache(teacher, records, folder, sizes=config.all_sizes, images=config.images)
    process.wait_for_everyone()
    return open_cache(folder, teacher)


def _require_same_run(directory: Path, inputs: dict[str, Any]) -> None:
    """Refuse to continue a run that was started from other inputs: its checkpoints are of another training."""
    require_same_inputs(directory / RUN, inputs, directory.rglob("checkpoints/*.safetensors"))


@contextmanager
def _stage_clock(file: Path, process: PartialState) -> Iterator[Callable[[str], None]]:
    """Yield a function that adds the seconds since its last call to a stage; `file` has the sums of all runs."""
    seconds = {stage: value for stage, value in read_json(file).items() if isinstance(value, int | float)}
    last = time.perf_counter()

    def count(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[stage] = seconds.get(stage, 0.0) + now - last
        last = now

    try:
        yield count
    finally:
        if process.is_main_process:
            write_json(file, seconds)
