"""What is measured of a trained student."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from experiments.config.base import FrozenModel, ImageSide

Guidance = Annotated[float, Field(ge=1)]
"""The scale of classifier-free guidance; 1 is none."""


class ImageMetricsConfig(FrozenModel):
    """Images of student and teacher for Fréchet distance, kernel distance and text-image score."""

    images: int = Field(32, ge=0, description="captions to sample; 0: no metric is measured")
    sizes: tuple[ImageSide, ...] = Field((64,), description="sizes to sample")
    resize: int | None = Field(
        None, gt=0, description="side of all images, true ones too, before a network; None: as is"
    )
    features: tuple[str, ...] = Field(("embedded",), description="networks: embedded, clip:WHERE, inception[:FILE]")
    data: str | None = Field(None, description="true images and captions, or coco:FOLDER; None: the training split")
    batch_size: int = Field(16, gt=0)


class EvaluationConfig(FrozenModel):
    """What is measured, the same for every variant of a grid."""

    sizes: tuple[ImageSide, ...] = (64, 128, 256, 512)
    shapes: tuple[tuple[ImageSide, ImageSide], ...] = Field(
        ((64, 128), (128, 64)), description="further (height, width)"
    )
    site_sizes: tuple[ImageSide, ...] = Field((64, 256), description="of `sizes`: where every site is compared as well")
    images: int = Field(8, gt=0, description="held-out images; 1 beyond four times the smallest size")
    timesteps: tuple[Annotated[int, Field(ge=0, lt=1000)], ...] = Field((100, 300, 500, 700, 900), min_length=1)
    prompts: tuple[str, ...] = ()
    sample_sizes: tuple[ImageSide, ...] = (64, 128, 256)
    sample_steps: int = Field(20, gt=0)
    guidance: Guidance = 3.0
    guidances: tuple[Guidance, ...] = Field((), description="further scales, for a sweep over all samples")
    metrics: ImageMetricsConfig = ImageMetricsConfig()
    speed_sizes: tuple[ImageSide, ...] = (64, 128, 256, 512)
    speed_repeats: int = Field(3, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _check_not_empty(self) -> EvaluationConfig:
        if not self.extents:
            raise ValueError("sizes and shapes are empty, so nothing would be compared with the teacher")
        return self

    @property
    def extents(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of everything that is compared with the teacher."""
        return tuple(dict.fromkeys([*((size, size) for size in self.sizes), *self.shapes]))

    @property
    def all_guidances(self) -> tuple[float, ...]:
        """`guidance`, and the others of a sweep."""
        return tuple(dict.fromkeys([self.guidance, *self.guidances]))

    def images_at(self, height: int, width: int) -> int:
        """Return how many held-out images are compared at a size."""
        return self.images if max(height, width) <= 4 * min(map(min, self.extents)) else 1
