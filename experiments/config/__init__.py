"""What an experiment is, as frozen, JSON-able pydantic models; an unknown key is refused everywhere."""

from experiments.config.base import FrozenModel, ImageSide
from experiments.config.distillation import DistillationConfig, LossTerm, MixerSpec, TrainingStage
from experiments.config.evaluation import EvaluationConfig, ImageMetricsConfig
from experiments.config.grid import CellConfig, Claim, Grid, Variant
from experiments.config.overrides import apply_grid_overrides, apply_overrides, resize_grid, validate_config
from experiments.config.training import FitConfig

__all__ = [
    "CellConfig",
    "Claim",
    "DistillationConfig",
    "EvaluationConfig",
    "FitConfig",
    "FrozenModel",
    "Grid",
    "ImageMetricsConfig",
    "ImageSide",
    "LossTerm",
    "MixerSpec",
    "TrainingStage",
    "Variant",
    "apply_grid_overrides",
    "apply_overrides",
    "resize_grid",
    "validate_config",
]
