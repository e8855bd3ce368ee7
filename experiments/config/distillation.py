"""How a student is distilled from a teacher."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from experiments.config.base import CONFIG_NAME, FrozenModel, ImageSide
from experiments.config.training import FitConfig
from experiments.core.registries import OBJECTIVES


class MixerSpec(FrozenModel):
    """How a mixer is mounted, and where; None means the mixer's published default."""

    causality: Literal["causal", "bidirectional", "noncausal"] | None = None
    normalize: bool | None = None
    options: dict[str, Any] = Field({}, description="fields of the mixer's configuration")
    select: str | tuple[str, ...] = Field("all", description="the sites, as `find_sites` takes them")
    min_tokens: int = Field(0, ge=0, description="sites with fewer tokens stay softmax")


class LossTerm(FrozenModel):
    """An objective's weight in the loss: 0 before step `start`, then rising linearly over `ramp` steps."""

    weight: float = Field(1.0, ge=0)
    start: int = Field(0, ge=0)
    ramp: int = Field(0, ge=0)
    options: dict[str, Any] = Field({}, description="fields of the objective")

    def weight_at(self, step: int) -> float:
        """Return the weight at a step; it is full from step start + ramp − 1 on."""
        return self.weight * min(1.0, max(0, step - self.start + 1) / max(1, self.ramp))


class TrainingStage(FrozenModel):
    """One training of the student: its loss and its settings. In files, `noise: 0.5` means `noise: {weight: 0.5}`."""

    name: str = Field(pattern=CONFIG_NAME)
    objectives: dict[str, LossTerm]
    fit: FitConfig
    sizes: tuple[ImageSide, ...] = Field((), description="image sizes, one step each in turn; (): image_size")

    @field_validator("objectives", mode="before")
    @classmethod
    def _expand_weights(cls, terms: Any) -> Any:
        if not isinstance(terms, dict):
            return terms
        return {name: {"weight": term} if isinstance(term, int | float) else term for name, term in terms.items()}

    @field_validator("objectives")
    @classmethod
    def _check_objectives(cls, terms: dict[str, LossTerm]) -> dict[str, LossTerm]:
        for name, term in terms.items():
            OBJECTIVES.create(name, **term.options)
        if not any(term.weight_at(0) > 0 for term in terms.values()):
            raise ValueError("no objective has a weight at step 0, so there would be nothing to minimize")
        return terms


class DistillationConfig(TrainingStage):
    """All stages of a distillation: those in `before`, then the stage that this model itself describes.

    The default objectives are the published loss, `noise + output/2 + features/2` (2409.02097 §3.4).
    """

    name: str = Field("distill", pattern=CONFIG_NAME)
    objectives: dict[str, LossTerm] = Field(
        {"noise": LossTerm(), "output": LossTerm(weight=0.5), "features": LossTerm(weight=0.5)}
    )
    before: tuple[TrainingStage, ...] = Field((), description="stages that come first, such as matrix and local")
    train: Literal["new", "new+projections"] = Field(
        "new+projections", description="what is trained: what the mixers add, and the q, k, v and output projections"
    )
    start: Literal["host", "random"] = Field("host", description="trained projections: the teacher's, or random")
    calibrate_outputs: bool = Field(
        False,
        description="before training, scale the output of every head to the teacher's by least squares; start='host'",
    )
    image_size: ImageSide = 64
    images: int = Field(1024, gt=0, description="training images, encoded once")
    caption_dropout: float = Field(0.0, ge=0, le=1, description="share of captions that are replaced by the empty one")
    gradient_checkpointing: bool = Field(False, description="less memory for about a third more time")

    @model_validator(mode="after")
    def _check_consistency(self) -> DistillationConfig:
        if self.start == "random" and self.train == "new":
            raise ValueError(
                "start='random' draws the trained projections, but train='new' trains no projections: drop one of them"
            )
        if self.start == "random" and self.calibrate_outputs:
            raise ValueError(
                "calibrate_outputs=True compares heads with the teacher's, and start='random' draws heads that have "
                "nothing in common with them: drop one of them"
            )
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages need different names, got {', '.join(names)}")
        return self

    @property
    def stages(self) -> tuple[TrainingStage, ...]:
        """All stages, in order."""
        return (*self.before, self)

    def sizes_of(self, stage: TrainingStage) -> tuple[int, ...]:
        """Return the image sizes in pixels that a stage alternates between."""
        return stage.sizes or (self.image_size,)

    @property
    def all_sizes(self) -> tuple[int, ...]:
        """`image_size`, then every other size that a stage trains at."""
        return tuple(dict.fromkeys([self.image_size, *(size for s in self.stages for size in self.sizes_of(s))]))
