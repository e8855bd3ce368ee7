"""Measure one optimizer step at full size with random weights: the time and memory that a distillation needs.

    python -m experiments.studies.optimizer_step SD-1.5 [--size 512] [--objectives local] [--train new]

Time and memory do not depend on the values of weights. The teacher's UNet is in memory once; the student trains in
float32.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.config import DistillationConfig, FitConfig, LossTerm, MixerSpec
from experiments.core.memory import measure_peak_bytes
from experiments.distill.batches import draw_batch
from experiments.distill.student import build_student, run_stages
from experiments.grids.compatibility import GRID
from experiments.highres.pipelines import open_pipeline
from experiments.teacher.teacher import Batch, Teacher
from unet_adapters.hosts import find_host

VAE_SCALE_FACTOR = 8  # of every published Stable Diffusion
MIXER = GRID.variants[0].mixer
TEXT_CONDITIONS = ("text", "pooled")


@dataclass(frozen=True)
class OptimizerStepCost:
    """What one optimizer step takes.

    Attributes:
        peak_bytes: above the weights of teacher and student; None if it cannot be measured.
        seconds: of the step.
    """

    peak_bytes: int | None
    seconds: float


class RandomBatches:
    """One sample of random latents and conditions, in the shapes that a teacher needs.

    Args:
        teacher: whose shapes they have.
        size: side of the image in pixels.
    """

    def __init__(self, teacher: Teacher, size: int) -> None:
        host = find_host(teacher.denoiser)
        side = size // VAE_SCALE_FACTOR
        shapes = {"latents": host.latent_shape((side, side)), **host.condition_shapes()}
        self._sample: Batch = {name: torch.randn(shape) for name, shape in shapes.items()}
        self.unconditional: Mapping[str, Tensor] = {
            name: value[0] for name, value in self._sample.items() if name in TEXT_CONDITIONS
        }

    def __len__(self) -> int:
        return 1

    def batch(self, indices: Tensor, size: int) -> Batch:
        """Return the sample once per index."""
        return {name: value.expand(len(indices), *value.shape[1:]) for name, value in self._sample.items()}


def measure_optimizer_step(
    architecture: str, size: int, dtype: torch.dtype, objectives: tuple[str, ...], train: str
) -> OptimizerStepCost:
    """Measure one step with one sample on the CPU.

    Args:
        architecture: name of a published UNet, such as "SD-1.5".
        size: side of the image in pixels.
        dtype: of the teacher.
        objectives: names of the objectives.
        train: which of the student's parameters are trained, as in `DistillationConfig`.
    """
    teacher = Teacher(open_pipeline(f"random:{architecture}", dtype, "cpu"))
    config = DistillationConfig(
        objectives={name: LossTerm() for name in objectives},
        fit=FitConfig(steps=1, batch_size=1, learning_rate=1e-4, warmup=0),
        train=train,
        image_size=size,
        images=1,
        gradient_checkpointing=True,
    )
    options = {"mid_dim": 80} if "XL" in architecture else {}
    adapter = build_student(teacher, MIXER, MixerSpec(options=options), config, 0)
    batches = RandomBatches(teacher, size)

    def draw(step: int, fit: FitConfig, sizes: tuple[int, ...], dropout: float) -> Batch:
        return draw_batch(batches, step, fit, teacher.train_timesteps, sizes, dropout)

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        peak = measure_peak_bytes(lambda: run_stages(teacher, adapter, config, draw, Path(folder), lambda *_: None))
    return OptimizerStepCost(peak, time.perf_counter() - start)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("architecture", help="SD-1.5, SD-2.1, SDXL base, …")
    parser.add_argument("--size", type=int, default=512, help="side of the image in pixels")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of the teacher")
    parser.add_argument("--objectives", nargs="+", default=["noise", "output", "features"])
    parser.add_argument("--train", default="new+projections", choices=["new", "new+projections"])
    options = parser.parse_args()
    dtype: torch.dtype = getattr(torch, options.dtype)
    cost = measure_optimizer_step(options.architecture, options.size, dtype, tuple(options.objectives), options.train)
    conditions = (
        options.architecture,
        f"{options.size} px",
        options.dtype,
        "+".join(options.objectives),
        options.train,
    )
    memory = ""
    if cost.peak_bytes is not None:
        memory = f"{cost.peak_bytes / 2**30:.2f} GiB above the weights of teacher and student, "
    print(f"{', '.join(conditions)}: {memory}{cost.seconds:.0f} s")
