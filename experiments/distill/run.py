"""`mixlab distill`: a recipe from teacher to run card. Start it again after a stop: finished stages are kept.

teacher -> encoded data -> adapter -> stages -> adapter/ -> card.md

Under `accelerate launch` every process trains; the main one alone writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState

from experiments.ablation import store
from experiments.data import open_records
from experiments.distill.cache import build_cache, open_cache
from experiments.distill.card import draw_samples, save_row, write_card
from experiments.distill.draw import Latents, draw
from experiments.distill.recipe import Recipe
from experiments.distill.setting import encode_pictures
from experiments.distill.student import Report, build_student, run_stages, seeded
from experiments.teacher.load import open_teacher
from experiments.teacher.teacher import Batch, Teacher
from experiments.training import FitConfig
from experiments.training.processes import this_process

RECIPE = "recipe.json"


def run_recipe(recipe: Recipe, directory: Path, report: Report) -> Path:
    """Distill as the recipe says; returns the path of the card.

    Args:
        recipe: as `load_recipe` gives it.
        directory: receives recipe.json, a folder a stage, samples/, adapter/, card.md, card.json and its pictures.
        report: called after each step as (stage, step, steps, losses).

    Raises:
        ValueError: the directory holds a run of another recipe; or teacher, data or mixer cannot be used as asked.
        FloatingPointError: a loss is not finite.
    """
    process = this_process()  # chooses this process's device
    _check_recipe(recipe, directory)
    teacher = open_teacher(recipe.teacher, getattr(torch, recipe.dtype))
    plan = seeded(recipe.distillation, recipe.seed)
    latents = _latents(recipe, teacher, process)
    adapter = build_student(teacher, recipe.mixer.name, recipe.mixer, plan, recipe.seed)
    process.wait_for_everyone()
    if process.is_main_process:  # not before: what cannot be opened leaves the folder as it was
        store.write_json(directory / RECIPE, recipe.model_dump(mode="json"))

    def batch(step: int, fit: FitConfig, sizes: tuple[int, ...], caption_dropout: float) -> Batch:
        drawn = draw(latents, step, fit, teacher.train_timesteps, sizes, caption_dropout)
        return {name: tensor.to(teacher.device) for name, tensor in drawn.items()}

    with _clock(directory / "seconds.json", process) as seconds:

        def tell(stage: str, done: int, steps: int, losses: dict[str, float]) -> None:
            if process.is_main_process and recipe.samples.due(done):
                path = directory / "samples" / f"{stage}-{done}.png"
                save_row(draw_samples(teacher, recipe.samples, plan.image_size), path)  # the student is mounted
            seconds(stage)
            report(stage, done, steps, losses)

        records = run_stages(teacher, adapter, plan, batch, directory, tell)
    card = directory / "card.md"
    if process.is_main_process:
        adapter.save_pretrained(directory / "adapter")
        spent = json.loads((directory / "seconds.json").read_text(encoding="utf-8"))
        stages = [{**record, "seconds": spent.get(record["stage"], 0.0)} for record in records]
        write_card(recipe, teacher, adapter, stages, directory)
    process.wait_for_everyone()
    return card


def _latents(recipe: Recipe, teacher: Teacher, process: PartialState) -> Latents:
    """The encoded pictures: from the recipe's cache, which the main process makes or completes, or in memory."""
    plan = recipe.distillation
    if recipe.cache is None:
        return encode_pictures(teacher, recipe.data, plan.all_sizes, plan.images)
    folder = Path(recipe.cache)
    if process.is_main_process:
        records = open_records(recipe.data, split="train")
        build_cache(teacher, records, folder, sizes=plan.all_sizes, images=plan.images)
    process.wait_for_everyone()
    return open_cache(folder, teacher)


def _check_recipe(recipe: Recipe, directory: Path) -> None:
    there = store.read_json(directory / RECIPE)
    if there and there != recipe.model_dump(mode="json"):
        raise ValueError(f"{directory} holds a run of another recipe ({RECIPE} says which): give another --out.")


@contextmanager
def _clock(file: Path, process: PartialState) -> Iterator[Callable[[str], None]]:
    """Counts the seconds since its last call for a stage; the sums of all runs in this folder are in `file`."""
    spent: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    last = time.perf_counter()

    def tick(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        spent[stage], last = spent.get(stage, 0.0) + now - last, now

    try:
        yield tick
    finally:
        if process.is_main_process:
            store.write_json(file, spent)
