"""Distillation of a mixer into a teacher's UNet."""

from experiments.distill.objective import DistillationLoss
from experiments.distill.objectives import Objective, list_objectives, register_objective
from experiments.distill.setting import Setting, open_setting
from experiments.distill.student import build_student, run_stages

__all__ = [
    "DistillationLoss",
    "Objective",
    "Setting",
    "build_student",
    "list_objectives",
    "open_setting",
    "register_objective",
    "run_stages",
]
