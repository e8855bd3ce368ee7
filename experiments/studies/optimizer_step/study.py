"""Measure one optimizer step at full size with random weights: the time and memory a distillation needs.

    python -m experiments.studies.optimizer_step SD-1.5 [--size 512] [--objectives local] [--train new]

Time and memory do not depend on the values of weights. The teacher's UNet is in memory once; the student trains in
float32.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from experiments.config import DistillationConfig, FitConfig, LossTerm, MixerSpec
from experiments.core.memory import measure_peak_bytes
from experiments.distill.batches import draw_batch
from experiments.distill.student import build_student, run_stages
from experiments.highres.pipelines import open_pipeline
from experiments.teacher.teacher import Batch, Teacher
from unet_adapters.hosts import find_host


class MadeUp:
    """Latents and conditions of normal numbers, in the shapes of a teacher's."""

    def __init__(self, teacher: Teacher, size: int) -> None:
        host = find_host(teacher.unet)
        side = size // 8
        shapes = {"latents": host.latent_shape((side, side)), **host.condition_shapes()}
        self.one: Batch = {name: torch.randn(shape) for name, shape in shapes.items()}
        conditions = ("text", "pooled")
        self.unconditional: Mapping[str, Tensor] = {n: t[0] for n, t in self.one.items() if n in conditions}

    def __len__(self) -> int:
        return 1

    def batch(self, indices: Tensor, size: int) -> Batch:
        """The one sample, as often as asked for."""
        return {name: value.expand(len(indices), *value.shape[1:]) for name, value in self.one.items()}


def one_step(
    architecture: str, size: int, dtype: torch.dtype, objectives: tuple[str, ...], train: str
) -> tuple[int | None, float]:
    """Peak bytes above the teacher's and the student's weights, and seconds, of one step with one sample."""
    teacher = Teacher(open_pipeline(f"random:{architecture}", dtype, "cpu"))
    plan = DistillationConfig(
        objectives={name: LossTerm() for name in objectives},
        fit=FitConfig(steps=1, batch_size=1, learning_rate=1e-4, warmup=0),
        train=train,
        image_size=size,
        images=1,
        gradient_checkpointing=True,
    )
    options = {"mid_dim": 80} if "XL" in architecture else {}
    adapter = build_student(teacher, _mixer(), MixerSpec(options=options), plan, 0)
    data = MadeUp(teacher, size)

    def batch(step: int, fit: FitConfig, sizes: tuple[int, ...], dropout: float) -> Batch:
        return draw_batch(data, step, fit, teacher.train_timesteps, sizes, dropout)

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        peak = measure_peak_bytes(lambda: run_stages(teacher, adapter, plan, batch, Path(folder), lambda *_: None))
    return peak, time.perf_counter() - start


def _mixer() -> str:
    from experiments.grids.compatibility import GRID

    return GRID.variants[0].mixer


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("architecture", help="SD-1.5, SD-2.1, SDXL base, …")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--objectives", nargs="+", default=["noise", "output", "features"])
    parser.add_argument("--train", default="new+projections", choices=["new", "new+projections"])
    asked = parser.parse_args()
    dtype, objectives = getattr(torch, asked.dtype), tuple(asked.objectives)
    peak, seconds = one_step(asked.architecture, asked.size, dtype, objectives, asked.train)
    resident = "" if peak is None else f"{peak / 2**30:.2f} GiB above the weights of teacher and student, "
    told = ", ".join((asked.architecture, f"{asked.size} px", asked.dtype, "+".join(objectives), asked.train))
    print(f"{told}: {resident}{seconds:.0f} s")


if __name__ == "__main__":
    main()
