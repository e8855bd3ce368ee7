"""A student as a distillation asks for it, and its stages one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from experiments.config import Distillation, MixerChoice, Stage
from experiments.distill.objective import DistillationLoss
from experiments.teacher.teacher import Batch, Teacher
from experiments.training import FitConfig, fit
from unet_adapters import MixerAdapter
from unet_adapters.student_weights import MIXER

Report = Callable[[str, int, int, dict[str, float]], None]
Draw = Callable[[int, FitConfig, tuple[int, ...], float], Batch]


def build_student(teacher: Teacher, mixer: str, choice: MixerChoice, plan: Distillation, seed: int) -> MixerAdapter:
    """An adapter for the teacher's UNet, not mounted; what starts random depends on `seed` alone.

    Raises:
        ValueError: no such mixer or site, or an option that it refuses.
    """
    torch.manual_seed(seed)
    return MixerAdapter.build(
        teacher.pipe,
        mixer,
        choice.select,
        causality=choice.causality,
        normalize=choice.normalize,
        train_projections=plan.train == "new+projections",
        min_tokens=choice.min_tokens,
        **choice.options,
    )


@torch.no_grad()
def randomize(adapter: MixerAdapter, seed: int) -> None:
    """Draw the trained q, k, v and output projections as torch draws a new linear layer: U(−1/√d, 1/√d)."""
    torch.manual_seed(seed)
    for name, parameter in adapter.parameters_by_name().items():
        if MIXER not in name.split("."):
            site = next(site for site in adapter.sites if name.startswith(f"{site.name}."))
            nn.init.uniform_(parameter, -(site.dim**-0.5), site.dim**-0.5)


def run_stages(
    teacher: Teacher, adapter: MixerAdapter, plan: Distillation, draw: Draw, directory: Path, report: Report
) -> list[dict[str, Any]]:
    """Train the adapter through all stages, in place, and leave it unmounted.

    Started again after a stop, finished stages are read back and the running one goes on from its last checkpoint.

    Args:
        draw: (step, fit, sizes, caption dropout) -> the batch; `Setting.batch` is one.
        directory: receives the training state and the log of the only stage; of several, each in `stage-1-<name>/` …
        report: called after each step as (stage, step, steps, losses).

    Returns:
        For each stage: its name, folder, steps, the seconds that this call spent in it, and its log.

    Raises:
        ValueError: `train` leaves nothing to train.
    """
    if not any(True for _ in adapter.student.parameters()):
        raise ValueError("train='new' leaves nothing to train: the mixers add no parameters. Use 'new+projections'.")
    if plan.start == "random":
        randomize(adapter, plan.fit.seed)
    records: list[dict[str, Any]] = []
    with _training(teacher, adapter, plan):
        for stage, folder in zip(plan.stages, stage_folders(plan, directory), strict=True):
            start, config, sizes = perf_counter(), stage.fit, plan.sizes_of(stage)

            def batch(step: int, config: FitConfig = config, sizes: tuple[int, ...] = sizes) -> Batch:
                return draw(step, config, sizes, plan.caption_dropout)

            def tell(done: int, losses: dict[str, float], stage: Stage = stage) -> None:
                report(stage.name, done, stage.fit.steps, losses)

            objective = DistillationLoss(teacher, adapter, stage.objectives)
            log = fit(objective, batch, config, folder, tell, watched=teacher.unet)
            spent = {"steps": config.steps, "seconds": perf_counter() - start, "log": log}
            records.append({"stage": stage.name, "folder": folder.name, **spent})
    return records


def stage_folders(plan: Distillation, directory: Path) -> list[Path]:
    """Where each stage trains."""
    if len(plan.stages) == 1:
        return [directory]
    return [directory / f"stage-{number}-{stage.name}" for number, stage in enumerate(plan.stages, 1)]


def seeded(plan: Distillation, seed: int) -> Distillation:
    """The plan with every stage's draws seeded by `seed` and its number, so that no two stages draw the same."""

    def reseed(stage: Stage, number: int) -> FitConfig:
        return stage.fit.model_copy(update={"seed": seed + 1000 * number})

    before = tuple(s.model_copy(update={"fit": reseed(s, number)}) for number, s in enumerate(plan.before, 1))
    return plan.model_copy(update={"before": before, "fit": reseed(plan, 0)})


@contextmanager
def _training(teacher: Teacher, adapter: MixerAdapter, plan: Distillation) -> Iterator[None]:
    """Checkpointing on where it is asked for, and a student of at least float32: small steps vanish in bfloat16.

    Mounted, the projections' own Parameters take the student's dtype; the last mount and unmount give theirs back.
    """
    unet, dtype = teacher.unet, teacher.unet.dtype
    was_checkpointing, trained = unet.is_gradient_checkpointing, torch.promote_types(dtype, torch.float32)
    adapter.unmount()
    adapter.student.to(trained)
    if plan.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if plan.gradient_checkpointing and not was_checkpointing:
            unet.disable_gradient_checkpointing()
        if trained != dtype:
            adapter.mount().student.to(dtype)
        adapter.unmount()
