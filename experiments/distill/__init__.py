"""Distillation of a mixer into a teacher's UNet."""

from experiments.distill.context import DistillationContext, open_context
from experiments.distill.loss import DistillationLoss
from experiments.distill.objectives import Objective, list_objectives, register_objective
from experiments.distill.student import build_student, run_stages

__all__ = [
    "DistillationContext",
    "DistillationLoss",
    "Objective",
    "build_student",
    "list_objectives",
    "open_context",
    "register_objective",
    "run_stages",
]
