"""Distillation of a mixer into a teacher's UNet."""

from experiments.distil.objective import Distil
from experiments.distil.objectives import Objective, list_objectives, register_objective
from experiments.distil.setting import Setting, open_setting
from experiments.distil.student import build_student, run_stages

__all__ = [
    "Distil",
    "Objective",
    "Setting",
    "build_student",
    "list_objectives",
    "open_setting",
    "register_objective",
    "run_stages",
]
