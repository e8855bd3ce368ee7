"""The objective `noise`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from experiments.core.registries import OBJECTIVES
from experiments.distill.objectives.base import DistillationStep, Objective, mean_square


@OBJECTIVES.register("noise")
@dataclass(frozen=True)
class NoiseObjective(Objective):
    """‖ŷ − y‖², the teacher's own training loss: y is the true noise, or velocity."""

    needs = frozenset({"student"})

    def __call__(self, step: DistillationStep) -> Tensor:
        return mean_square(step.student.prediction, step.target)
