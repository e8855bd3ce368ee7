"""A teacher small enough for tests: the real recipe's code, two steps of training."""

import gc
from pathlib import Path

import pytest

from experiments.config import DistillationConfig, EvaluationConfig, FitConfig, GeneratedImagesConfig, Grid, Variant
from experiments.teacher.export import export_state
from experiments.teacher.recipe import TeacherRecipe
from experiments.teacher.train import train_teacher

TINY = TeacherRecipe(
    text_width=32,
    text_layers=1,
    judge_width=48,
    judge_layers=1,
    vae_channels=(8, 8, 8),
    unet_channels=(8, 16),
    unet_heads=(2, 2),
    unet_transformers=1,
    dit_width=16,
    dit_heads=2,
    dit_layers=2,
    shard=8,
    shards=1,
    vae=FitConfig(steps=2, batch_size=4, learning_rate=1e-3),
    decoder=FitConfig(steps=2, batch_size=4, learning_rate=1e-3),
    unet=FitConfig(steps=2, batch_size=4, learning_rate=1e-3, ema=0.9),
    dit=FitConfig(steps=2, batch_size=4, learning_rate=1e-3, ema=0.9, optimizer="muon", schedule="constant"),
    judge=FitConfig(steps=2, batch_size=4, learning_rate=1e-3),
)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny pipeline in diffusers format."""
    state = tmp_path_factory.mktemp("state")
    train_teacher(state, TINY)
    folder = export_state(tmp_path_factory.mktemp("teacher"), state, TINY)
    gc.collect()
    gc.freeze()  # the modules imported by now: a measurement of memory walks through all objects that are not frozen
    return folder


@pytest.fixture
def grid(tiny_teacher: Path) -> Grid:
    """Three cells that take seconds."""
    return Grid(
        name="tiny",
        question="Does every part work together?",
        teacher=str(tiny_teacher),
        variants=(
            Variant(name="softmax", label="softmax, untouched", mixer="softmax", trained=False),
            Variant(name="linear", label="linear attention", mixer="linear_attention"),
            Variant(name="linear_raw", label="linear, not normalized", mixer="linear_attention", normalize=False),
        ),
        distillation=DistillationConfig(
            fit=FitConfig(steps=6, batch_size=2, learning_rate=1e-3, checkpoint_every=2, log_every=2), images=8
        ),
        evaluation=EvaluationConfig(
            sizes=(64, 128),
            shapes=(),
            generated=GeneratedImagesConfig(images=0),
            held_in_images=2,
            images=2,
            timesteps=(500,),
            prompts=("a red apple, teal background",),
            sample_sizes=(64,),
            sample_steps=2,
            metrics={
                "fidelity": {},
                "timesteps": {},
                "sites": {"sizes": (64,)},
                "cost": {"sizes": (64, 128), "repeats": 1},
            },
        ),
    )
