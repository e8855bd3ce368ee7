"""The one training loop: the teacher's stages and every distillation run through it."""

from experiments.training.checkpoints import elapsed, forget
from experiments.training.loop import Interrupted, fit
from experiments.training.plan import FitConfig, pick

__all__ = ["FitConfig", "Interrupted", "elapsed", "fit", "forget", "pick"]
