"""An ablation: variants × seeds over one teacher, data set, loss and evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from experiments.config.base import CONFIG_NAME, FrozenModel, short_hash
from experiments.config.distillation import DistillationConfig, MixerSpec
from experiments.config.evaluation import EvaluationConfig

ControlRole = Literal["teacher", "no mixing", "fixed mixing"]


class Variant(MixerSpec):
    """One row of an ablation: a mixer and its options, mounted at the selected sites.

    `trained=False` mounts the mixer as it is: with softmax that is the sanity row, whose error must be zero.
    `distillation` replaces the grid's, for grids that compare how students are made; None is the grid's.
    `control` marks rows that findings are held against: the teacher's own attention with random projections, the
    identity, and other mixers whose matrix does not depend on the input.
    """

    name: str = Field(pattern=CONFIG_NAME)
    label: str
    mixer: str
    trained: bool = True
    distillation: DistillationConfig | None = None
    control: ControlRole | None = None


_NAMES = {"name", "label", "control"}
"""Fields of a variant that change no number."""


class CellConfig(FrozenModel):
    """One variant × one seed: everything its numbers depend on, and whether it draws samples."""

    teacher: str
    teacher_variant: str | None = None
    data: str
    variant: Variant
    seed: int
    distillation: DistillationConfig
    evaluation: EvaluationConfig
    draws_samples: bool = True

    @property
    def id(self) -> str:
        """A readable name and the hash of everything that the numbers depend on: not of what the variant is called."""
        numbers = self.model_dump(mode="json", exclude={"draws_samples": True, "variant": _NAMES})
        return f"{self.variant.name}-s{self.seed}-{short_hash(numbers)}"

    @property
    def training(self) -> str:
        """The hash of what the trained weights depend on: all but the evaluation, and what the variant is called."""
        weights = self.model_dump(mode="json", exclude={"draws_samples": True, "evaluation": True, "variant": _NAMES})
        return short_hash(weights)


class Claim(FrozenModel):
    """A hypothesis that the report tests against the numbers: what a factor's value does to the error.

    Factors are "normalization" (value "not normalized"), "causality" ("causal", "bidirectional"), and "mixer" (a name).
    Each is compared with its reference: normalized, non-causal, and the mixer of the grid's reference row.
    """

    statement: str
    factor: Literal["normalization", "causality", "mixer"]
    value: str
    worse: bool = Field(description="True: the claim is that the error is higher; False: that it is lower")
    beyond: bool = Field(False, description="True: the claim concerns only sizes above all that are distilled at")


class PlannedComparison(FrozenModel):
    """Two rows of a grid whose errors the report compares, beside the rows that differ in one factor alone.

    Attributes:
        name: what the comparison is of, such as "equal parameters".
        above, below: names of variants; the effect is the error of the first over that of the second.
    """

    name: str
    above: str
    below: str


class Grid(FrozenModel):
    """An ablation: variants × seeds over one teacher, data set, distillation and evaluation."""

    name: str = Field(pattern=CONFIG_NAME, description="names its folder, too")
    question: str
    teacher: str = "embedded"
    teacher_variant: str | None = Field(None, description="the teacher's weight files to read, such as fp16")
    data: str = "scenes"
    variants: tuple[Variant, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    distillation: DistillationConfig
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    reference: str | None = Field(None, description="the row that others are compared with; None: the first mixer")
    claims: tuple[Claim, ...] = ()
    comparisons: tuple[PlannedComparison, ...] = Field((), description="further pairs of rows that the report compares")

    @model_validator(mode="after")
    def _check_names(self) -> Grid:
        names = [variant.name for variant in self.variants]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"variants need different names: {', '.join(repeated)} is there more than once")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds need to be different, got {', '.join(map(str, self.seeds))}")
        if self.reference is not None and self.reference not in names:
            raise ValueError(f"the reference {self.reference!r} is no variant: expected one of {', '.join(names)}")
        for row in (row for comparison in self.comparisons for row in (comparison.above, comparison.below)):
            if row not in names:
                raise ValueError(f"a comparison names {row!r}, which is no variant: expected one of {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _check_training_images(self) -> Grid:
        shared = (self.distillation.all_sizes, self.distillation.images)
        for variant in self.variants:
            own = variant.distillation
            if own is not None and (own.all_sizes, own.images) != shared:
                raise ValueError(
                    f"the variant {variant.name!r} trains on other images than the grid: its sizes and number are "
                    f"{(own.all_sizes, own.images)}, the grid's are {shared}. Rows are compared on the same images"
                )
        return self

    def cells(self) -> list[CellConfig]:
        """Return one configuration per seed and variant, seed by seed, so that a first table is complete early.

        Samples are drawn with the first seed alone, whose images the report has.
        """
        return [
            CellConfig(
                teacher=self.teacher,
                teacher_variant=self.teacher_variant,
                data=self.data,
                variant=variant,
                seed=seed,
                distillation=variant.distillation or self.distillation,
                evaluation=self.evaluation,
                draws_samples=seed == self.seeds[0],
            )
            for seed in self.seeds
            for variant in self.variants
        ]
