"""The one training loop: the teacher's stages and every distillation run through it."""

from experiments.training.checkpoints import delete_checkpoints, save_weights, training_seconds
from experiments.training.loop import LossCallback, StageCallback, fit
from experiments.training.schedule import batch_indices

__all__ = [
    "LossCallback",
    "StageCallback",
    "batch_indices",
    "delete_checkpoints",
    "fit",
    "save_weights",
    "training_seconds",
]
