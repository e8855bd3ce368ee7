"""What a factor of the design does to the error: rows that differ in it alone, compared seed by seed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from experiments.report.records import Run, Variant
from experiments.report.statistics import Interval, bootstrap, log_ratios, mean_by_seed

METRIC = "relative_error_to_teacher"


@dataclass(frozen=True)
class Factor:
    """A switch of the design, and the value that the others are compared with."""

    name: str
    field: str
    reference: Any
    values: dict[Any, str]


FACTORS = (
    Factor("normalization", "normalize", True, {False: "not normalized"}),
    Factor("causality", "causality", "noncausal", {"causal": "causal", "bidirectional": "bidirectional"}),
    Factor("causality", "causality", "causal", {"bidirectional": "bidirectional over causal"}),
)
TOLD = {True: "normalized", False: "not normalized", "noncausal": "non-causal"}
SPLITS = {"mixer": "the mixer", "causality": "the causality", "normalize": "normalization"}
"""What an effect may depend on."""
OTHERS = {
    "options": "an option of the mixer",
    "select": "the choice of sites",
    "min_tokens": "the least number of tokens",
    "distillation": "the distillation",
}
"""What else rows may differ in: each is compared with the reference row where it differs in that alone."""
ZEROS = 1.0
"""Error of a prediction of zeros. What a factor does to a row that is as wrong as that is nothing."""


@dataclass(frozen=True)
class Pair:
    """A row, the one that it is compared with, and the log ratio of their errors by seed, at one size."""

    above: Variant
    below: Variant
    logs: Mapping[int, float]

    @property
    def ratio(self) -> Interval:
        """Of the errors."""
        return bootstrap(list(self.logs.values())).exp()

    def values(self, fields: Iterable[str]) -> tuple[Any, ...]:
        """Of other factors, which both rows share."""
        return tuple(getattr(self.below, field) for field in fields)


@dataclass(frozen=True)
class Effect:
    """The error with a factor at one value over the error at its reference, everything else alike.

    Attributes:
        factor, value: as claims name them.
        field: the variants' field that is the factor.
        above, below: value and reference for readers.
        pairs: of rows that differ in the factor alone, and whose reference is nearer to the teacher than zeros are.
        hopeless: how many more pairs there are, whose reference is not.
    """

    factor: str
    value: str
    field: str
    above: str
    below: str
    size: int
    pairs: tuple[Pair, ...]
    hopeless: int = 0

    @cached_property
    def ratio(self) -> Interval:
        """Geometric mean over pairs of rows, with its interval over seeds; 1 is no effect."""
        return bootstrap(mean_by_seed([p.logs for p in self.pairs])).exp()

    @property
    def marked(self) -> bool:
        """Whether the interval excludes no effect."""
        return self.ratio.excludes(1.0)

    def parts(self, *fields: str) -> dict[tuple[Any, ...], Effect]:
        """The effect among the rows of each combination of values of other factors."""
        keys = list(dict.fromkeys(p.values(fields) for p in self.pairs))
        return {k: replace(self, pairs=tuple(p for p in self.pairs if p.values(fields) == k)) for k in keys}

    def among(self, field: str) -> dict[Any, Effect]:
        """The effect among the rows of each value of another factor; nothing where there is only one."""
        found = {value: part for (value,), part in self.parts(field).items()}
        return {} if field == self.field or len(found) < 2 else found

    @cached_property
    def depends(self) -> str | None:
        """The field among whose values the effect goes both ways, each beyond chance; None if no field is that.

        A mean over such rows is no answer. One seed knows no chance: there any two sides count.
        """
        opposed = {}
        for field in SPLITS:
            parts = [e.ratio for e in self.among(field).values()]
            means = [r.mean for r in parts if r.excludes(1.0) or (r.seeds < 2 and math.isfinite(r.mean))]
            if means and 0 < min(means) < 1 < max(means):
                opposed[field] = max(means) / min(means)
        return max(opposed, key=lambda field: opposed[field]) if opposed else None


def effects(run: Run) -> list[Effect]:
    """Every factor's effect at every size: normalization, causality, the mixer, and whatever else rows differ in."""
    found = []
    for factor in (*FACTORS, *_families(run)):
        for value, told in factor.values.items():
            matched = list(_pairs(run, factor, value))
            for size in run.sizes:
                effect = _effect(run, factor, value, told, matched, size)
                found += [effect] if effect else []
    for variant, reference, field in _others(run):
        other = Factor(OTHERS[field], field, None, {})
        for size in run.sizes:
            effect = _effect(run, other, variant.name, variant.name, [(variant, reference)], size)
            found += [replace(effect, above=variant.label, below=reference.label)] if effect else []
    return found


def seeds_of(run: Run, variant: Variant, size: int, metric: str = METRIC) -> dict[int, float]:
    """A metric of a variant's finished cells by seed."""
    cells = run.done(variant.name)
    return {c.seed: getattr(c.fidelity[size], metric) for c in cells if c.seed is not None and size in c.fidelity}


def against(run: Run, variant: Variant, reference: Variant, size: int) -> Interval | None:
    """The row's error over the reference row's, seed by seed; None where they share no seed."""
    ratios = log_ratios(seeds_of(run, variant, size), seeds_of(run, reference, size))
    return bootstrap(list(ratios.values())).exp() if ratios else None


def reads(run: Run, value: Any) -> str:
    """A factor's value as readers know it."""
    return TOLD.get(value) or run.mixers.get(value) or str(value)


def _effect(
    run: Run, factor: Factor, value: Any, told: str, matched: list[tuple[Variant, Variant]], size: int
) -> Effect | None:
    pairs = [Pair(*v, log_ratios(seeds_of(run, v[0], size), seeds_of(run, v[1], size))) for v in matched]
    most = max((len(p.logs) for p in pairs), default=0)
    pairs = [p for p in pairs if p.logs and len(p.logs) == most]  # unfinished pairs would cost seeds
    sound = [p for p in pairs if _mean(seeds_of(run, p.below, size)) < ZEROS]
    if not mean_by_seed([p.logs for p in sound]):
        return None
    names = reads(run, value), reads(run, factor.reference)
    return Effect(factor.name, told, factor.field, *names, size, tuple(sound), len(pairs) - len(sound))


def _pairs(run: Run, factor: Factor, value: Any) -> Iterator[tuple[Variant, Variant]]:
    """Rows that differ in the factor alone."""
    trained = [v for v in run.variants if not v.untouched]
    references = {_key(v, factor): v for v in trained if getattr(v, factor.field) == factor.reference}
    for variant in trained:
        below = references.get(_key(variant, factor))
        if below is not None and getattr(variant, factor.field) == value:
            yield variant, below


def _others(run: Run) -> Iterator[tuple[Variant, Variant, str]]:
    """Rows that differ from the reference row in one field alone that is no factor of its own; both, and the field."""
    reference = run.reference
    if reference is None:
        return
    for variant in (v for v in run.variants if not v.untouched):
        differing = [f for f in Variant.DESIGN if getattr(variant, f) != getattr(reference, f)]
        if len(differing) == 1 and differing[0] in OTHERS:
            yield variant, reference, differing[0]


def _mean(values: Mapping[int, float]) -> float:
    return math.fsum(values.values()) / len(values)


def _key(variant: Variant, factor: Factor) -> str:
    return json.dumps([getattr(variant, f) for f in Variant.DESIGN if f != factor.field], sort_keys=True, default=str)


def _families(run: Run) -> list[Factor]:
    """Mixers against that of the reference row."""
    order = list(dict.fromkeys(str(v.mixer) for v in run.variants if not v.untouched))
    if len(order) < 2 or run.reference is None:
        return []
    first = str(run.reference.mixer)
    return [Factor("mixer", "mixer", first, {mixer: mixer for mixer in order if mixer != first})]
