"""grid.json: what readers of a run need to know of its grid, written when the run starts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from experiments.ablation.variants import effective_feature_map, has_own_feature_map
from experiments.config import Claim, ControlRole, DistillationConfig, FrozenModel, Grid, PlannedComparison
from experiments.core.environment import describe_environment
from experiments.data import credit
from mixers import registry

FILE = "grid.json"
NormalizationLevel = Literal["normalized", "mean scale", "not normalized"]


class Budget(FrozenModel):
    """A budget of time, and how it scaled the grid.

    Attributes:
        seconds: for the whole run.
        factor: of every cell's training steps.
        plan: hash of what was scaled.
    """

    seconds: float
    factor: float
    plan: str


class VariantDescription(FrozenModel):
    """A row of the ablation with its defaults filled in.

    Attributes:
        feature_map: the one in effect; None if the mixer has none.
        has_own_feature_map: whether that is the mixer's default, or what its default becomes when it is normalized.
    """

    name: str
    label: str
    mixer: str
    causality: str
    normalize: bool
    trained: bool = True
    options: dict[str, Any] = Field(default_factory=dict)
    feature_map: str | None = None
    has_own_feature_map: bool = True
    select: Any = "all"
    min_tokens: int = 0
    distillation: DistillationConfig | None = None
    control: ControlRole | None = None

    @property
    def untouched(self) -> bool:
        """Whether this is the teacher's own softmax, mounted and not trained, whose error must be zero."""
        return not self.trained

    @property
    def normalization(self) -> NormalizationLevel:
        """The level of normalization: rows that sum to 1, sums bounded by l₀/l, or sums that grow with l."""
        if self.normalize:
            return "normalized"
        return "mean scale" if self.options.get("scale") == "mean" else "not normalized"

    @property
    def other_options(self) -> dict[str, Any]:
        """The options except those that `normalization` and `feature_map` stand for."""
        options = {name: value for name, value in self.options.items() if (name, value) != ("scale", "mean")}
        return {name: value for name, value in options.items() if name != "feature_map"}


class CellDescription(FrozenModel):
    """A cell of the grid."""

    id: str
    variant: str
    seed: int


class RunDescription(FrozenModel):
    """A run: its grid, what was measured with, and notes for its readers.

    Attributes:
        train_size: side of the training images in pixels.
        reference: name of the row that others are compared with.
        protocol: the distillation and the evaluation, as they were configured.
        environment: versions and device.
    """

    name: str
    question: str = ""
    teacher: str = "not recorded"
    teacher_variant: str | None = None
    data: str = "not recorded"
    train_size: int = 64
    sizes: tuple[int, ...] = ()
    sample_sizes: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    reference: str | None = None
    variants: tuple[VariantDescription, ...] = ()
    claims: tuple[Claim, ...] = ()
    comparisons: tuple[PlannedComparison, ...] = ()
    cells: tuple[CellDescription, ...] = ()
    protocol: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    budget: Budget | None = None


def describe_run(grid: Grid, budget: Budget | None = None, note: str = "") -> RunDescription:
    """Describe a grid for grid.json.

    Args:
        grid: as it runs, scaled by the budget if there is one.
        budget: what scaled it.
        note: a sentence about it for readers.
    """
    evaluation = grid.evaluation
    notes = list(filter(None, [credit(grid.data)]))
    return RunDescription(
        name=grid.name,
        question=grid.question,
        teacher=grid.teacher,
        teacher_variant=grid.teacher_variant,
        data=grid.data,
        train_size=grid.distillation.image_size,
        sizes=evaluation.sizes,
        sample_sizes=evaluation.sample_sizes,
        prompts=evaluation.prompts,
        seeds=grid.seeds,
        reference=grid.reference or next((v.name for v in grid.variants if v.trained and v.control is None), None),
        variants=tuple(_describe_variant(variant) for variant in grid.variants),
        claims=grid.claims,
        comparisons=grid.comparisons,
        cells=tuple(CellDescription(id=c.id, variant=c.variant.name, seed=c.seed) for c in grid.cells()),
        protocol={
            "distillation": grid.distillation.model_dump(mode="json"),
            "evaluation": evaluation.model_dump(mode="json"),
        },
        environment=describe_environment(),
        notes=tuple([*notes, *([note] if note else [])]),
        budget=budget,
    )


def _describe_variant(variant: Any) -> VariantDescription:
    entry = registry.get_mixer_entry(variant.mixer)
    fields = {name: getattr(variant, name) for name in VariantDescription.model_fields if "feature_map" not in name}
    fields["feature_map"] = effective_feature_map(variant)
    fields["has_own_feature_map"] = has_own_feature_map(variant)
    fields["causality"] = variant.causality or entry.default_causality
    fields["normalize"] = entry.default_normalize if variant.normalize is None else variant.normalize
    return VariantDescription(**fields)
