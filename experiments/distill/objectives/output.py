"""The objective `output`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from experiments.core.registries import OBJECTIVES
from experiments.distill.objectives.base import DistillationStep, Objective, mean_square


@OBJECTIVES.register("output")
@dataclass(frozen=True)
class OutputObjective(Objective):
    """‖ŷ − y_T‖², the distance to the teacher's prediction."""

    needs = frozenset({"teacher", "student"})

    def __call__(self, step: DistillationStep) -> Tensor:
        return mean_square(step.student.prediction, step.teacher.prediction)
