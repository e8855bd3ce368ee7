"""What a selection of sites depends on, and what it is for: a share of softmax sites, or a time budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import Field, field_validator, model_validator

from experiments.config import DistillationConfig, EvaluationConfig, FrozenModel, GeneratedImagesConfig
from experiments.grids.shared import fit_config, loss_terms
from mixers import registry

DISTILLATION = DistillationConfig(
    name="local", objectives=loss_terms(local=1.0), fit=fit_config(150, 3e-3), images=1024, calibrate_outputs=True
)
EVALUATION = EvaluationConfig(
    sizes=(64, 128, 256),
    shapes=(),
    images=16,
    held_in_images=0,
    timesteps=(200, 500, 800),
    generated=GeneratedImagesConfig(images=0),
    metrics={},
)


class HybridConfig(FrozenModel):
    """Everything that the measured numbers depend on, except the machine."""

    mixers: tuple[str, ...] = Field(min_length=1, description="candidates, with their published defaults")
    teacher: str = "embedded"
    teacher_variant: str | None = None
    data: str = "scenes"
    distillation: DistillationConfig = Field(DISTILLATION, description="trains all sites at once, each by itself")
    evaluation: EvaluationConfig = Field(EVALUATION, description="sizes, held-out images and timesteps")
    repeats: int = Field(7, gt=0, description="turns that the medians of times are taken over")
    random_selections: int = Field(3, ge=0, description="random selections to compare with")
    seed: int = 0

    @model_validator(mode="after")
    def _check_images(self) -> HybridConfig:
        split_images(self.evaluation.images, self.evaluation.timestep_groups)
        return self

    @field_validator("mixers")
    @classmethod
    def _check_mixers(cls, mixers: tuple[str, ...]) -> tuple[str, ...]:
        for name in mixers:
            registry.get_mixer_entry(name)
        return tuple(dict.fromkeys(mixers))


def split_images(count: int, groups: int) -> tuple[list[int], list[int]]:
    """Split images into those that sites are selected on, and those that selections are compared on.

    The best of many selections looks better on the images that it was selected on than it is.

    Args:
        count: of images.
        groups: of images by turns, which are compared at different timesteps; each half has all of them.

    Returns:
        The numbers of the images of each half.

    Raises:
        ValueError: there are too few images for two halves.
    """
    groups = min(groups, count)
    if count < 2 * groups or count < 2:
        raise ValueError(
            f"Cannot select sites on some images and compare selections on others: expected {2 * max(1, groups)} "
            f"held-out images or more, got {count}. Use a larger evaluation.images, or data with more images."
        )
    halves: tuple[list[int], list[int]] = ([], [])
    for image in range(count):
        halves[image // groups % 2].append(image)
    return halves


@dataclass(frozen=True)
class SelectionGoal:
    """What limits the selection; exactly one of the two is given.

    Attributes:
        keep: the largest share of sites that stay softmax attention, in [0, 1).
        budget: the longest time of a forward pass at the largest size, as a multiple of the fastest selection's.

    Raises:
        ValueError: both or none are given, or the number is out of range.
    """

    keep: float | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.budget is None):
            raise ValueError("Cannot select sites: expected either --keep or --budget, such as --keep 25%.")
        if self.keep is not None and not 0 <= self.keep < 1:
            raise ValueError(f"Cannot keep {self.keep:.0%} of the sites: expected at least 0% and less than 100%.")
        if self.budget is not None and not (1 <= self.budget < math.inf):
            raise ValueError(
                f"Cannot meet a budget of {self.budget:g}x: it is a multiple of the fastest selection's time, so "
                "expected 1x or more."
            )

    def __str__(self) -> str:
        if self.keep is not None:
            return f"at most {self.keep:.0%} of the sites keep softmax attention"
        return f"at most {self.budget:g} × the time of the fastest selection"


def parse_goal(keep: str | None, budget: str | None) -> SelectionGoal:
    """Parse the options of the command.

    Args:
        keep: such as "25%" or "0.25".
        budget: such as "1.5x" or "1.5".

    Raises:
        ValueError: no number, or as `SelectionGoal`.
    """
    share = None if keep is None else _number("--keep", keep, "%", "25%")
    if share is not None and keep is not None and keep.strip().endswith("%"):
        share /= 100
    return SelectionGoal(share, None if budget is None else _number("--budget", budget, "x×", "1.5x"))


def _number(option: str, text: str, suffixes: str, example: str) -> float:
    try:
        return float(text.strip().rstrip(suffixes))
    except ValueError:
        raise ValueError(f"Cannot read {option} {text!r}: expected a number such as {example}.") from None
