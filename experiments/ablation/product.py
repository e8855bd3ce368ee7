"""Variants as a product: mixers × causality × normalization, without the combinations that a mixer refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product as combinations
from typing import Any

from experiments.config import Variant
from mixers import create_mixer, registry
from mixers.traits import CAUSALITIES, Causality

LABELS = {"causal": "causal", "bidirectional": "bidirectional", "noncausal": "non-causal"}


def product(
    mixers: Mapping[str, str],
    causalities: Sequence[Causality] = CAUSALITIES,
    normalizations: Sequence[bool] = (True, False),
    keep: Callable[[Variant], bool] = lambda _: True,
    **choice: Any,
) -> tuple[Variant, ...]:
    """One variant for every combination that its mixer offers, mixer by mixer, with a name and a label that tell it.

    Args:
        mixers: {registered name: how it is called in labels}.
        causalities, normalizations: the values to combine; those that a mixer does not offer are left out.
        keep: a filter of the variants; `distinct` is one.
        choice: the other fields of every variant, as `options={"scan": "hilbert"}`.

    Raises:
        ValueError: no mixer of that name, or nothing is left.
    """
    found = []
    for (name, label), causality, normalize in combinations(mixers.items(), causalities, normalizations):
        entry = registry.get_mixer_entry(name)
        if causality not in entry.causalities or normalize not in entry.normalizations:
            continue
        variant = Variant(
            name=f"{name}_{causality}_{'normalized' if normalize else 'unnormalized'}",
            label=f"{label}, {LABELS[causality]}, {'normalized' if normalize else 'not normalized'}",
            mixer=name,
            causality=causality,
            normalize=normalize,
            **choice,
        )
        if keep(variant):
            found.append(variant)
    if not found:
        raise ValueError(
            f"Nothing is left of {', '.join(mixers)} × {', '.join(causalities)} × normalize in {list(normalizations)}: "
            "`mixlab list` shows what each mixer offers."
        )
    return tuple(found)


def distinct(variant: Variant) -> bool:
    """Whether a variant is none of the others by another name: bidirectional without an order is non-causal."""
    entry = registry.get_mixer_entry(variant.mixer)
    if variant.causality != "bidirectional" or "noncausal" not in entry.causalities:
        return True
    options = {**entry.mixer.drop_in_options, **variant.options}
    mixer = create_mixer(
        variant.mixer, 8, 2, causality=variant.causality, normalize=variant.normalize, own_projections=False, **options
    )
    return not mixer.traits.permutation_equivariant
