"""What a factor of the design does to the error: rows that differ in it alone, compared seed by seed, image by image.

The pairs of rows are fixed by the grid, before anything is measured. A pair with an unfinished or failed row makes its
effect incomplete; it is never left out for its outcome. Normalized and unnormalized rows are never pooled: the effect
of causality or of a mixer is one of normalized rows, and another one of unnormalized rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from experiments.ablation.description import NormalizationLevel, VariantDescription
from experiments.core.statistics import Interval, holm, interval_over_seeds
from experiments.report.errors import log_ratios_of, pooled_ratio
from experiments.report.run_files import DESIGN_FIELDS, RunRecord

CONTROL = "control"
SIGNIFICANCE = 0.05
"""Largest p-value, after Holm's correction, of an effect that counts as distinguishable from noise."""


NORMALIZATIONS: tuple[NormalizationLevel, ...] = get_args(NormalizationLevel)


@dataclass(frozen=True)
class Factor:
    """A switch of the design, two of whose values are compared.

    Attributes:
        name: as claims name it.
        field: of a variant, that is the factor.
        value, reference: of the field.
        above, below: the same for readers.
        within: (field, value) that both rows must have; None: any.
    """

    name: str
    field: str
    value: Any
    reference: Any
    above: str
    below: str
    within: tuple[str, str] | None = None

    @property
    def rows(self) -> str:
        """Which rows both must be, for readers: "normalized", "unnormalized"; empty if any."""
        return self.within[1].replace("not normalized", "unnormalized") if self.within else ""

    @property
    def is_control(self) -> bool:
        """Whether it compares a control with a mixer."""
        return self.name == CONTROL


def _causality(value: str, reference: str, level: str) -> Factor:
    readable = {"causal": "causal", "bidirectional": "bidirectional", "noncausal": "non-causal"}
    return Factor(
        "causality", "causality", value, reference, readable[value], readable[reference], ("normalization", level)
    )


FACTORS = (
    Factor("normalization", "normalization", "not normalized", "normalized", "not normalized", "normalized"),
    Factor("bounded sum", "normalization", "not normalized", "mean scale", "not normalized", 'scale="mean"'),
    Factor("normalized rows", "normalization", "mean scale", "normalized", 'scale="mean"', "normalized"),
    *(
        _causality(value, reference, level)
        for level in NORMALIZATIONS
        for value, reference in (("causal", "noncausal"), ("bidirectional", "noncausal"), ("bidirectional", "causal"))
    ),
)
"""Normalization as a whole, and its two parts: that sums are bounded, and that each row sums to 1."""
READABLE = {"noncausal": "non-causal"}
SPLITS = {"mixer": "the mixer", "causality": "the causality", "normalization": "normalization"}
"""What an effect may depend on."""
OTHER_FIELDS = {
    "feature_map": "the feature map",
    "other_options": "an option of the mixer",
    "select": "the choice of sites",
    "min_tokens": "the minimum number of tokens",
    "distillation": "the distillation",
}
"""What else rows may differ in: each is compared with the reference row if it differs in that alone."""


@dataclass(frozen=True)
class Pair:
    """Two rows that differ in one factor, and the log ratios of their errors (images,) by seed, at one size."""

    above: VariantDescription
    below: VariantDescription
    logs: Mapping[int, NDArray[np.float64]]

    @cached_property
    def ratio(self) -> Interval:
        """Ratio of the errors, as a geometric mean over seeds and images."""
        return interval_over_seeds(self.logs).exp()

    def values(self, fields: Iterable[str]) -> tuple[Any, ...]:
        """Return the values of other factors, which both rows share."""
        return tuple(getattr(self.below, field) for field in fields)


@dataclass(frozen=True)
class Effect:
    """The error with a factor at one value over the error at its reference, everything else alike, at one size.

    Attributes:
        factor: what differs.
        size: side of the images in pixels.
        pairs: all pairs of the grid that are measured.
        planned: how many pairs the grid has.
        seeds: how many seeds the grid has.
        adjusted_p: p-value after Holm's correction for what it is compared together with; NaN for a single seed, and
            until it is corrected.
    """

    factor: Factor
    size: int
    pairs: tuple[Pair, ...]
    planned: int
    seeds: int = 0
    adjusted_p: float = math.nan

    @cached_property
    def ratio(self) -> Interval:
        """Geometric mean over pairs, seeds and images, with its 95 % interval over seeds and images; 1 is no effect."""
        return pooled_ratio([pair.logs for pair in self.pairs])

    @property
    def name(self) -> str:
        """ "not normalized ÷ normalized", with the level of normalization if the effect is of one."""
        within = f" ({self.factor.rows} rows)" if self.factor.within else ""
        return f"{self.factor.above} ÷ {self.factor.below}{within}"

    @property
    def complete(self) -> bool:
        """Whether every pair of the grid is measured with every seed."""
        return len(self.pairs) == self.planned and all(len(pair.logs) >= self.seeds for pair in self.pairs)

    @property
    def significant(self) -> bool:
        """Whether it is distinguishable from noise after correction for the number of comparisons."""
        return self.adjusted_p < SIGNIFICANCE

    def parts(self, *fields: str) -> dict[tuple[Any, ...], Effect]:
        """Return the effect among the rows of each combination of values of other factors; p-values not corrected."""
        keys = list(dict.fromkeys(pair.values(fields) for pair in self.pairs))
        groups = {key: tuple(pair for pair in self.pairs if pair.values(fields) == key) for key in keys}
        return {
            key: replace(self, pairs=pairs, planned=len(pairs), adjusted_p=math.nan) for key, pairs in groups.items()
        }

    def split_by(self, field: str) -> dict[Any, Effect]:
        """Return the effect among the rows of each value of another factor; nothing if there is only one value."""
        parts = {value: part for (value,), part in self.parts(field).items()}
        return {} if field == self.factor.field or len(parts) < 2 else parts

    @cached_property
    def depends(self) -> str | None:
        """The field among whose values the effect has opposite signs, each beyond its interval; None if there is none.

        A mean over such rows answers nothing. With a single seed, any two opposite signs count.
        """
        opposed = {}
        for field in SPLITS:
            ratios = [effect.ratio for effect in self.split_by(field).values()]
            means = [r.mean for r in ratios if r.excludes(1.0) or (not r.has_bounds and math.isfinite(r.mean))]
            if means and 0 < min(means) < 1 < max(means):
                opposed[field] = max(means) / min(means)
        return max(opposed, key=lambda field: opposed[field]) if opposed else None


def compute_effects(run: RunRecord) -> list[Effect]:
    """Compute every factor's effect at every size, with p-values corrected for their number.

    Factors are normalization and its parts, causality, the mixer, and whatever else rows differ in.
    """
    planned = [(factor, list(_pairs(run, factor))) for factor in (*FACTORS, *_mixer_factors(run))]
    planned += [*_other_factors(run), *_planned_comparisons(run)]
    effects = [
        effect
        for factor, pairs in planned
        if pairs
        for size in run.sizes
        if (effect := _effect(run, factor, pairs, size)) is not None
    ]
    return correct_together(effects)


def correct_together(effects: Sequence[Effect]) -> list[Effect]:
    """Return the effects with p-values after Holm's correction for their number."""
    adjusted = holm([effect.ratio.p_value for effect in effects])
    return [replace(effect, adjusted_p=p) for effect, p in zip(effects, adjusted, strict=True)]


def readable(run: RunRecord, value: Any) -> str:
    """Return a factor's value as readers know it."""
    return READABLE.get(value) or run.mixer_labels.get(value) or str(value)


def _effect(
    run: RunRecord, factor: Factor, pairs: list[tuple[VariantDescription, VariantDescription]], size: int
) -> Effect | None:
    measured = [Pair(above, below, log_ratios_of(run, above, below, size)) for above, below in pairs]
    measured = [pair for pair in measured if pair.logs]
    if not measured:
        return None
    effect = Effect(factor, size, tuple(measured), len(pairs), len(run.description.seeds))
    return effect if effect.ratio.count else None


def _pairs(run: RunRecord, factor: Factor) -> Iterator[tuple[VariantDescription, VariantDescription]]:
    """Rows of the grid that differ in the factor alone."""
    rows = run.trained
    if factor.within is not None:
        field, level = factor.within
        rows = [variant for variant in rows if getattr(variant, field) == level]
    references = {_design(v, factor): v for v in rows if getattr(v, factor.field) == factor.reference}
    for variant in rows:
        below = references.get(_design(variant, factor))
        if below is not None and getattr(variant, factor.field) == factor.value:
            yield variant, below


def _design(variant: VariantDescription, factor: Factor) -> str:
    """What both rows of a pair share; mixers are compared with each one's own feature map, unless the grid sets one."""
    parts = {field: getattr(variant, field) for field in DESIGN_FIELDS if field != factor.field}
    if factor.field == "mixer" and variant.has_own_feature_map:
        parts["feature_map"] = None
    return json.dumps(parts, sort_keys=True, default=str)


def _mixer_factors(run: RunRecord) -> list[Factor]:
    """Mixers against that of the reference row, at each level of normalization."""
    order = list(dict.fromkeys(variant.mixer for variant in run.trained))
    if len(order) < 2 or run.reference is None:
        return []
    first = run.reference.mixer
    controls = {variant.mixer for variant in run.trained if variant.control is not None}
    return [
        Factor(
            CONTROL if mixer in controls else "mixer",
            "mixer",
            mixer,
            first,
            readable(run, mixer),
            readable(run, first),
            ("normalization", level),
        )
        for level in NORMALIZATIONS
        for mixer in order
        if mixer != first
    ]


def _planned_comparisons(
    run: RunRecord,
) -> Iterator[tuple[Factor, list[tuple[VariantDescription, VariantDescription]]]]:
    """Pairs of rows that the grid names."""
    rows = {variant.name: variant for variant in run.trained}
    for planned in run.description.comparisons:
        above = rows.get(planned.above)
        below = rows.get(planned.below)
        if above is not None and below is not None:
            factor = Factor(planned.name, "name", above.name, below.name, above.label, below.label)
            yield factor, [(above, below)]


def _other_factors(run: RunRecord) -> Iterator[tuple[Factor, list[tuple[VariantDescription, VariantDescription]]]]:
    """Rows that differ from the reference row in one field alone that is no factor of its own."""
    reference = run.reference
    if reference is None:
        return
    for variant in run.trained:
        differing = [field for field in DESIGN_FIELDS if getattr(variant, field) != getattr(reference, field)]
        if len(differing) == 1 and differing[0] in OTHER_FIELDS:
            field = differing[0]
            name = OTHER_FIELDS[field]
            factor = Factor(name, field, variant.name, reference.name, variant.label, reference.label)
            yield factor, [(variant, reference)]
