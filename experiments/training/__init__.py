"""The one training loop: the teacher's stages and every distillation run through it."""

from experiments.training.checkpoints import delete_checkpoints, training_seconds
from experiments.training.loop import StageCallback, StepCallback, fit
from experiments.training.schedule import batch_indices

__all__ = ["StageCallback", "StepCallback", "batch_indices", "delete_checkpoints", "fit", "training_seconds"]
