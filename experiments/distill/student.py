"""The student of a distillation, and its training stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from experiments.config import DistillationConfig, FitConfig, MixerSpec, TrainingStage
from experiments.core.registries import OBJECTIVES
from experiments.distill.loss import DistillationLoss
from experiments.distill.output_gains import apply_output_gains, fit_output_gains
from experiments.teacher.teacher import Batch, Teacher
from experiments.training import StageCallback, fit
from experiments.training.processes import this_process
from mixers import registry
from mixers.user_source import source_digest
from unet_adapters import MixerAdapter
from unet_adapters.files import save_tensors
from unet_adapters.student_weights import MIXER

CALIBRATION_BATCHES = 4
"""Batches of the first stage on which output gains are fitted."""
OUTPUT_GAINS = "output_gains.safetensors"

BatchSource = Callable[[int, FitConfig, tuple[int, ...], float], Batch]
"""Called as (step, fit, sizes, caption dropout) -> the batch; `DistillationContext.batch` is one."""


def build_student(teacher: Teacher, mixer: str, spec: MixerSpec, config: DistillationConfig, seed: int) -> MixerAdapter:
    """Build an adapter for the teacher's UNet, not mounted; its random initial values depend on `seed` alone.

    Raises:
        ValueError: no such mixer or site, or an option that the mixer does not have.
    """
    torch.manual_seed(seed)
    gain: dict[str, Any] = {"output_gain": True} if config.calibrate_outputs else {}
    return MixerAdapter.build(
        teacher.pipe,
        mixer,
        spec.select,
        causality=spec.causality,
        normalize=spec.normalize,
        train_projections=config.train == "new+projections",
        min_tokens=spec.min_tokens,
        **gain,
        **spec.options,
    )


def training_sources(mixer: str, config: DistillationConfig) -> str:
    """Return the digest of the mixer's and the objectives' classes, with the source of those that are a user's own."""
    objectives = sorted({name for stage in config.stages for name in stage.objectives})
    classes = [registry.get_mixer_entry(mixer).mixer, *(OBJECTIVES.get(name) for name in objectives)]
    return source_digest(*classes)


@torch.no_grad()
def randomize_projections(adapter: MixerAdapter, seed: int) -> None:
    """Draw the trained q, k, v and output projections as torch initializes a linear layer: U(−1/√d, 1/√d)."""
    torch.manual_seed(seed)
    for name, parameter in adapter.parameters_by_name().items():
        if MIXER not in name.split("."):
            site = next(site for site in adapter.sites if name.startswith(f"{site.name}."))
            nn.init.uniform_(parameter, -(site.dim**-0.5), site.dim**-0.5)


def run_stages(
    teacher: Teacher,
    adapter: MixerAdapter,
    config: DistillationConfig,
    draw: BatchSource,
    directory: Path,
    callback: StageCallback,
) -> list[dict[str, Any]]:
    """Train the adapter through all stages, in place, and leave it unmounted.

    Started again after a stop, it reads the results of finished stages back and continues the running one from its last
    checkpoint.

    Args:
        teacher: whose UNet the adapter is for.
        adapter: the student.
        config: its stages.
        draw: the batches.
        directory: receives the training state and the log of the only stage, or, if there are several, of each one in
            `stage-1-<name>/` and so on.
        callback: called after each step.

    Returns:
        For each stage: its name, folder, steps, the seconds that this call spent in it, and its log.

    Raises:
        ValueError: `train` leaves nothing to train.
    """
    if not any(True for _ in adapter.student.parameters()):
        raise ValueError("train='new' leaves nothing to train: the mixers add no parameters. Use 'new+projections'.")
    if config.start == "random":
        randomize_projections(adapter, config.fit.seed)
    records: list[dict[str, Any]] = []
    with _prepared_for_training(teacher, adapter, config):
        if config.calibrate_outputs:
            _calibrate(teacher, adapter, config, draw, directory)
        for stage, folder in zip(config.stages, stage_folders(config, directory), strict=True):
            start = perf_counter()
            sizes = config.sizes_of(stage)

            def batch(step: int, fit_config: FitConfig = stage.fit, sizes: tuple[int, ...] = sizes) -> Batch:
                return draw(step, fit_config, sizes, config.caption_dropout)

            def after_step(completed: int, losses: dict[str, float], stage: TrainingStage = stage) -> None:
                callback(stage.name, completed, stage.fit.steps, losses)

            loss = DistillationLoss(teacher, adapter, stage.objectives)
            log = fit(loss, batch, stage.fit, folder, after_step, watched=teacher.denoiser)
            records.append(
                {
                    "stage": stage.name,
                    "folder": folder.name,
                    "steps": stage.fit.steps,
                    "seconds": perf_counter() - start,
                    "log": log,
                }
            )
    return records


def _calibrate(
    teacher: Teacher, adapter: MixerAdapter, config: DistillationConfig, draw: BatchSource, directory: Path
) -> None:
    """Set the output gains: those that an earlier run of this directory computed, or new ones."""
    first = config.stages[0]
    path = directory / OUTPUT_GAINS
    if path.is_file():
        apply_output_gains(adapter, load_file(path))
        return
    batches = (draw(step, first.fit, config.sizes_of(first), 0.0) for step in range(CALIBRATION_BATCHES))
    gains = fit_output_gains(teacher, adapter, batches)
    apply_output_gains(adapter, gains)
    if this_process().is_main_process:
        save_tensors(path, gains)


def stage_folders(config: DistillationConfig, directory: Path) -> list[Path]:
    """Return the folder that each stage trains in."""
    if len(config.stages) == 1:
        return [directory]
    return [directory / f"stage-{number}-{stage.name}" for number, stage in enumerate(config.stages, 1)]


def seed_stages(config: DistillationConfig, seed: int) -> DistillationConfig:
    """Return the configuration with a different seed for every stage, so that no two stages draw the same batches."""

    def reseed(stage: TrainingStage, number: int) -> FitConfig:
        return stage.fit.model_copy(update={"seed": seed + 1000 * number})

    before = tuple(s.model_copy(update={"fit": reseed(s, number)}) for number, s in enumerate(config.before, 1))
    return config.model_copy(update={"before": before, "fit": reseed(config, 0)})


@contextmanager
def _prepared_for_training(teacher: Teacher, adapter: MixerAdapter, config: DistillationConfig) -> Iterator[None]:
    """Switch gradient checkpointing on if configured, and train in float32 at least: small steps vanish in bfloat16.

    While mounted, the projections' own Parameters have the student's dtype; the last mount and unmount restore theirs.
    """
    unet = teacher.denoiser
    was_checkpointing = unet.is_gradient_checkpointing
    training_dtype = torch.promote_types(unet.dtype, torch.float32)
    original_dtype = unet.dtype
    adapter.unmount()
    adapter.student.to(training_dtype)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if config.gradient_checkpointing and not was_checkpointing:
            unet.disable_gradient_checkpointing()
        if training_dtype != original_dtype:
            adapter.mount().student.to(original_dtype)
        adapter.unmount()
