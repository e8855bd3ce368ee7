"""The training that the crash test kills, in a process of its own: it resumes from the last checkpoint."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from experiments.config import DistillationConfig, FitConfig, MixerSpec
from experiments.studies.crash_test.study import WEIGHTS
from experiments.training import fit
from mixers.files import atomic_path


class NoisyRegression(nn.Module):
    """A small network whose loss depends on random numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 8))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the loss of a batch (b, 8)."""
        return {"loss": (self.layers(x) + torch.randn_like(x)).square().mean()}


def train(folder: Path, steps: int, pause: float, distill: bool) -> None:
    """Train from the last checkpoint on, and write the weights at the end.

    Args:
        folder: of the training.
        steps: of the training.
        pause: seconds that are added to each step.
        distill: train a distillation of the embedded teacher instead of a small regression.
    """
    torch.set_num_threads(1)
    config = FitConfig(
        steps=steps, batch_size=4, learning_rate=1e-3, warmup=2, ema=0.9, checkpoint_every=1, log_every=1
    )
    model, batch = _distillation(config) if distill else _regression()
    fit(model, batch, config, folder, lambda step, losses: time.sleep(pause))
    with atomic_path(folder / WEIGHTS) as partial:
        save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, partial)


def _regression() -> tuple[nn.Module, Callable[[int], Any]]:
    return NoisyRegression(), lambda step: torch.full((4, 8), float(step % 7))


def _distillation(fit_config: FitConfig) -> tuple[nn.Module, Callable[[int], Any]]:
    from experiments.distill import DistillationLoss, build_student, open_context  # slow to import
    from experiments.grids.compatibility import GRID

    context = open_context("embedded", GRID.data, 64, 32)
    config = DistillationConfig(fit=fit_config)
    adapter = build_student(context.teacher, GRID.variants[0].mixer, MixerSpec(select="mid_block"), config, 0)
    loss = DistillationLoss(context.teacher, adapter, config.objectives)
    return loss, lambda step: context.batch(step, fit_config)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--pause", type=float, required=True)
    parser.add_argument("--distill", action="store_true")
    options = parser.parse_args()
    train(options.folder, options.steps, options.pause, options.distill)


if __name__ == "__main__":
    main()
