"""What an experiment is, as frozen, JSON-able pydantic models; an unknown key is refused everywhere."""

from experiments.config.base import FrozenModel, ImageSide
from experiments.config.distillation import DistillationConfig, LossTerm, MixerSpec, TrainingStage
from experiments.config.evaluation import EvaluationConfig, GeneratedImagesConfig
from experiments.config.grid import CellConfig, Claim, ControlRole, Grid, PlannedComparison, Variant
from experiments.config.overrides import apply_grid_overrides, apply_overrides, resize_grid, validate_config
from experiments.config.training import FitConfig

__all__ = [
    "CellConfig",
    "Claim",
    "ControlRole",
    "DistillationConfig",
    "EvaluationConfig",
    "FitConfig",
    "FrozenModel",
    "GeneratedImagesConfig",
    "Grid",
    "ImageSide",
    "LossTerm",
    "MixerSpec",
    "PlannedComparison",
    "TrainingStage",
    "Variant",
    "apply_grid_overrides",
    "apply_overrides",
    "resize_grid",
    "validate_config",
]
