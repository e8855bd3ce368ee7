"""The published transformers with random weights, at a reduced width: one optimizer step of a distillation."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.config import DistillationConfig, FitConfig, LossTerm, MixerSpec
from experiments.distill.batches import draw_batch
from experiments.distill.student import build_student, run_stages
from experiments.highres.random_pipeline import RandomPipeline
from experiments.studies.optimizer_step.study import RandomBatches
from experiments.teacher.teacher import Batch, Teacher
from unet_adapters.highres import generate
from unet_adapters.hosts.transformers.profiles import TRANSFORMER_PROFILES

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
REDUCED: dict[str, dict[str, Any]] = {
    "PixArt-Sigma": {**HEADS, "num_layers": 2, "cross_attention_dim": 16, "caption_channels": 12, "sample_size": 16},
    "SD3.5-medium": {
        **HEADS,
        "num_layers": 2,
        "caption_projection_dim": 16,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
    },
    "Flux": {
        **HEADS,
        "num_layers": 1,
        "num_single_layers": 1,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (2, 2, 4),
    },
}
SMALL_AUTOENCODER = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "layers_per_block": 1}
SIZE = 64


@pytest.mark.parametrize("profile", TRANSFORMER_PROFILES, ids=lambda profile: profile.name)
def test_one_optimizer_step_changes_the_student_and_not_the_teacher(profile: Any, tmp_path: Path) -> None:
    reduced = replace(
        profile, config={**profile.config, **REDUCED[profile.name]}, vae={**profile.vae, **SMALL_AUTOENCODER}
    )
    teacher = Teacher(RandomPipeline(reduced, torch.float32, "cpu", initialize=True))  # type: ignore[arg-type]
    before = {name: tensor.clone() for name, tensor in teacher.denoiser.state_dict().items()}
    config = DistillationConfig(
        objectives={"noise": LossTerm(), "output": LossTerm(), "features": LossTerm(weight=0.5)},
        fit=FitConfig(steps=1, batch_size=2, learning_rate=1e-2, warmup=0),
        calibrate_outputs=True,
        image_size=SIZE,
        images=1,
    )
    adapter = build_student(teacher, "linear_attention", MixerSpec(), config, seed=0)
    fresh = {name: parameter.detach().clone() for name, parameter in adapter.parameters_by_name().items()}
    batches = RandomBatches(teacher, SIZE)

    def draw(step: int, fit: FitConfig, sizes: tuple[int, ...], dropout: float) -> Batch:
        return draw_batch(batches, step, fit, teacher.train_timesteps, sizes, dropout)

    losses: list[dict[str, float]] = []
    run_stages(teacher, adapter, config, draw, tmp_path, lambda stage, step, steps, values: losses.append(values))

    assert len(losses) == 1 and set(losses[0]) == {"loss", *config.objectives}
    assert all(math.isfinite(value) for value in losses[0].values())
    changed = [name for name, parameter in adapter.parameters_by_name().items() if not parameter.equal(fresh[name])]
    assert len(changed) > len(fresh) / 2
    after = teacher.denoiser.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("profile", TRANSFORMER_PROFILES, ids=lambda profile: profile.name)
def test_random_transformers_generate(profile: Any) -> None:
    reduced = replace(
        profile, config={**profile.config, **REDUCED[profile.name]}, vae={**profile.vae, **SMALL_AUTOENCODER}
    )
    pipe = RandomPipeline(reduced, torch.float32, "cpu", initialize=True)
    assert generate(pipe, "sun", (SIZE, SIZE), base_size=SIZE, steps=1).pixels.shape == (SIZE, SIZE, 3)
