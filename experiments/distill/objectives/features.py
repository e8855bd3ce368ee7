"""The objective `features`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.core.registries import OBJECTIVES
from experiments.distill.objectives.base import DistillationStep, Objective, mean_square


@OBJECTIVES.register("features")
@dataclass(frozen=True)
class FeatureObjective(Objective):
    """The mean over sites of ‖a − a_T‖²: the outputs of the student's and the teacher's sites in their own forwards."""

    needs = frozenset({"teacher", "student", "sites"})

    def __call__(self, step: DistillationStep) -> Tensor:
        pairs = [(step.student.sites[name].output, call.output) for name, call in step.teacher.sites.items()]
        return torch.stack([mean_square(student, teacher) for student, teacher in pairs]).mean()
