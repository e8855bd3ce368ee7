"""Distillation of a mixer into a teacher's UNet."""

from experiments.distil.objective import Distil
from experiments.distil.setting import Setting, open_setting

__all__ = ["Distil", "Setting", "open_setting"]
