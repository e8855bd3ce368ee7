"""What is measured of a trained student."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, Field, field_validator, model_validator

from experiments.config.base import FrozenModel, ImageSide
from experiments.core.registries import METRICS
from mixers.suggest import unknown_name

Guidance = Annotated[float, Field(ge=1)]
"""The scale of classifier-free guidance; 1 is none."""
Timestep = Annotated[int, Field(ge=0, lt=1000)]


class GeneratedImagesConfig(FrozenModel):
    """Images that student and teacher generate from the same captions and noise, for distances and scores."""

    images: int = Field(500, ge=0, description="captions to sample; 0: nothing is generated for metrics")
    sizes: tuple[ImageSide, ...] = Field((64,), description="sizes to sample")
    resize: int | None = Field(
        None, gt=0, description="side of all images, true ones too, before a network; None: as is"
    )
    features: tuple[str, ...] = Field(
        ("embedded",), description="networks: embedded, clip:WHERE, dino:WHERE, inception[:FILE]"
    )
    data: str | None = Field(None, description="true images and captions, or coco:FOLDER; None: the training split")
    batch_size: int = Field(16, gt=0)


def _default_metrics() -> dict[str, dict[str, Any]]:
    return {name: {} for name, metric in METRICS.items() if metric.by_default}


class EvaluationConfig(FrozenModel):
    """What is measured, the same for every variant of a grid."""

    sizes: tuple[ImageSide, ...] = (64, 128, 256)
    shapes: tuple[tuple[ImageSide, ImageSide], ...] = Field(
        ((64, 128), (128, 64)), description="further (height, width)"
    )
    images: int = Field(64, gt=0, description="held-out images that predictions are compared on, at every size")
    held_in_images: int = Field(64, ge=0, description="held-in images, compared at the smallest size alone; 0: none")
    timesteps: tuple[Timestep, ...] = Field((50, 200, 350, 500, 650, 800, 900, 950, 999), min_length=1)
    timesteps_per_image: int = Field(
        3,
        gt=0,
        description="timesteps at which one image is compared beyond the smallest size, where it is at all of them",
    )
    batch_size: int = Field(16, gt=0, description="images in one forward pass; changes rounding alone")
    prompts: tuple[str, ...] = ()
    sample_sizes: tuple[ImageSide, ...] = (64, 128, 256)
    sample_steps: int = Field(20, gt=0)
    guidance: Guidance = 3.0
    guidances: tuple[Guidance, ...] = Field((), description="further scales, for a sweep over all samples")
    generated: GeneratedImagesConfig = GeneratedImagesConfig()
    metrics: dict[str, dict[str, Any]] = Field(
        default_factory=_default_metrics,
        validate_default=True,
        description="metrics by name, each with its own settings",
    )
    seed: int = 0

    @field_validator("metrics")
    @classmethod
    def _fill_options(cls, metrics: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {name: _complete_options(name, options) for name, options in metrics.items()}

    @model_validator(mode="after")
    def _check_not_empty(self) -> EvaluationConfig:
        if not self.extents:
            raise ValueError("sizes and shapes are empty, so nothing would be compared with the teacher")
        return self

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def extents(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of everything that is compared with the teacher."""
        return tuple(dict.fromkeys([*((size, size) for size in self.sizes), *self.shapes]))

    @property
    def smallest_extent(self) -> tuple[int, int]:
        """(height, width) of the smallest images, at which held-in images are compared as well."""
        return min(self.extents, key=lambda extent: extent[0] * extent[1])

    @property
    def timestep_groups(self) -> int:
        """Groups of images that share the timesteps beyond the smallest size, so that every image has its number."""
        return math.ceil(len(self.timesteps) / self.timesteps_per_image)

    @property
    def all_guidances(self) -> tuple[float, ...]:
        """`guidance`, and the others of a sweep."""
        return tuple(dict.fromkeys([self.guidance, *self.guidances]))

    def metric_options(self) -> list[tuple[str, Any]]:
        """Return (name, options) of every metric to measure, as the metric's own type of options."""
        return [(name, METRICS.get(name).options_type(**options)) for name, options in self.metrics.items()]


def _complete_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Check a metric's settings and fill in its defaults, so that the configuration says everything it depends on.

    Raises:
        ValueError: there is no such metric or setting.
    """
    kind: type[BaseModel] = METRICS.get(name).options_type
    for option in options:
        if option not in kind.model_fields:
            raise ValueError(unknown_name(f"setting of the metric {name}", option, kind.model_fields))
    return kind(**options).model_dump(mode="json")
