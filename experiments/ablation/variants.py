"""Variants as combinations: mixers × causality × normalization, without those that a mixer refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from experiments.config import Variant
from mixers import create_mixer, registry
from mixers.traits import CAUSALITIES, Causality

CAUSALITY_LABELS = {"causal": "causal", "bidirectional": "bidirectional", "noncausal": "non-causal"}


def combine_variants(
    mixers: Mapping[str, str],
    causalities: Sequence[Causality] = CAUSALITIES,
    normalizations: Sequence[bool] = (True, False),
    condition: Callable[[Variant], bool] = lambda _: True,
    mean_scale: bool = False,
    **fields: Any,
) -> tuple[Variant, ...]:
    """Return one variant for every combination that its mixer offers, mixer by mixer, with a unique name and label.

    Args:
        mixers: {registered name: its name in labels}.
        causalities, normalizations: the values to combine; those that a mixer does not offer are left out.
        condition: a filter of the variants, such as `is_distinct`.
        mean_scale: whether every unnormalized variant that is not causal has a companion with `scale="mean"`, whose
            sums are bounded but whose rows are not normalized: the control that splits the effect of normalization.
        fields: the other fields of every variant, as `options={"scan": "hilbert"}`.

    Raises:
        ValueError: there is no mixer of that name, or no variant is left.
    """
    variants = []
    for (name, label), causality, normalize in product(mixers.items(), causalities, normalizations):
        entry = registry.get_mixer_entry(name)
        if causality not in entry.causalities or normalize not in entry.normalizations:
            continue
        variant = Variant(
            name=f"{name}_{causality}_{'normalized' if normalize else 'unnormalized'}",
            label=f"{label}, {CAUSALITY_LABELS[causality]}, {'normalized' if normalize else 'not normalized'}",
            mixer=name,
            causality=causality,
            normalize=normalize,
            **fields,
        )
        if condition(variant):
            variants.append(variant)
            if mean_scale and not normalize and causality != "causal" and _offers_mean_scale(name):
                variants.append(_with_mean_scale(variant, label))
    if not variants:
        raise ValueError(
            f"No variant is left of {', '.join(mixers)} × {', '.join(causalities)} × normalize in "
            f"{list(normalizations)}: `mixlab list` shows what each mixer offers."
        )
    return tuple(variants)


def is_distinct(variant: Variant) -> bool:
    """Whether no other variant computes the same: a bidirectional mixer without an order equals its non-causal form."""
    entry = registry.get_mixer_entry(variant.mixer)
    if variant.causality != "bidirectional" or "noncausal" not in entry.causalities:
        return True
    options = {**entry.mixer.drop_in_options, **variant.options}
    mixer = create_mixer(
        variant.mixer, 8, 2, causality=variant.causality, normalize=variant.normalize, own_projections=False, **options
    )
    return not mixer.traits.permutation_equivariant


def _offers_mean_scale(mixer: str) -> bool:
    return "scale" in {field.name for field in dataclasses.fields(registry.get_mixer_entry(mixer).config)}


def _with_mean_scale(variant: Variant, label: str) -> Variant:
    causality = CAUSALITY_LABELS[variant.causality or "noncausal"]
    return variant.model_copy(
        update={
            "name": f"{variant.mixer}_{variant.causality}_mean_scale",
            "label": f'{label}, {causality}, scale="mean"',
            "options": {**variant.options, "scale": "mean"},
        }
    )
