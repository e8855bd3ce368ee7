"""The one training loop: the teacher's stages and every distillation run through it."""

from experiments.training.loop import FitConfig, fit, pick

__all__ = ["FitConfig", "fit", "pick"]
