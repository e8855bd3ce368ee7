"""What a factor of the design does to the error: rows that differ in it alone, compared seed by seed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
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
    Factor("normalisation", "normalize", True, {False: "not normalised"}),
    Factor("causality", "causality", "noncausal", {"causal": "causal", "bidirectional": "bidirectional"}),
)
REFERENCES = {True: "normalised", "noncausal": "non-causal"}


@dataclass(frozen=True)
class Pair:
    """A row, and the one that it is compared with, at one size."""

    above: Variant
    below: Variant
    ratio: Interval


@dataclass(frozen=True)
class Effect:
    """The error with a factor at one value over the error at its reference, everything else alike.

    Attributes:
        ratio: geometric mean over pairs of rows, with its interval over seeds; 1 is no effect.
        pairs: of rows, each with its own.
    """

    factor: str
    value: str
    reference: str
    size: int
    ratio: Interval
    pairs: tuple[Pair, ...]

    @property
    def marked(self) -> bool:
        """Whether the interval excludes no effect."""
        return self.ratio.excludes(1.0)


def effects(run: Run) -> list[Effect]:
    """Every factor's effect at every size: normalisation, causality, and the family where a grid has several."""
    found = []
    for factor in (*FACTORS, *_families(run)):
        for value, told in factor.values.items():
            matched = list(_pairs(run, factor, value))
            for size in run.sizes:
                effect = _effect(run, factor, told, matched, size)
                found += [effect] if effect else []
    return found


def seeds_of(run: Run, variant: Variant, size: int, metric: str = METRIC) -> dict[int, float]:
    """A metric of a variant's finished cells by seed."""
    cells = run.done(variant.name)
    return {c.seed: getattr(c.fidelity[size], metric) for c in cells if c.seed is not None and size in c.fidelity}


def against(run: Run, variant: Variant, reference: Variant, size: int) -> Interval | None:
    """The row's error over the reference row's, seed by seed; None where they share no seed."""
    ratios = log_ratios(seeds_of(run, variant, size), seeds_of(run, reference, size))
    return bootstrap(list(ratios.values())).exp() if ratios else None


def _effect(run: Run, factor: Factor, told: str, matched: list[tuple[Variant, Variant]], size: int) -> Effect | None:
    found = [(v, log_ratios(seeds_of(run, v[0], size), seeds_of(run, v[1], size))) for v in matched]
    most = max((len(ratios) for _, ratios in found), default=0)
    found = [(v, ratios) for v, ratios in found if ratios and len(ratios) == most]  # unfinished pairs would cost seeds
    shared = mean_by_seed([ratios for _, ratios in found])
    if not shared:
        return None
    pairs = tuple(Pair(*v, bootstrap(list(ratios.values())).exp()) for v, ratios in found)
    reference = REFERENCES.get(factor.reference, factor.reference)
    return Effect(factor.name, told, reference, size, bootstrap(shared).exp(), pairs)


def _pairs(run: Run, factor: Factor, value: Any) -> Iterator[tuple[Variant, Variant]]:
    """Rows that differ in the factor alone."""
    trained = [v for v in run.variants if not v.untouched]
    references = {_key(v, factor): v for v in trained if getattr(v, factor.field) == factor.reference}
    for variant in trained:
        below = references.get(_key(variant, factor))
        if below is not None and getattr(variant, factor.field) == value:
            yield variant, below


def _key(variant: Variant, factor: Factor) -> str:
    return json.dumps([getattr(variant, f) for f in Variant.DESIGN if f != factor.field], sort_keys=True, default=str)


def _families(run: Run) -> list[Factor]:
    """Mixers against that of the reference row."""
    order = list(dict.fromkeys(str(v.mixer) for v in run.variants if not v.untouched))
    if len(order) < 2 or run.reference is None:
        return []
    first = str(run.reference.mixer)
    return [Factor("mixer", "mixer", first, {mixer: mixer for mixer in order if mixer != first})]
