"""Variants as combinations: mixers × causality × normalization, without those that a mixer refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from experiments.config import Variant
from mixers import TokenMixer, create_mixer, registry
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

    Unnormalized variants have the feature map of the normalized ones, which is positive, so that normalization is all
    that differs; `feature_map="identity"` among the options gives GLA, Mamba and the delta rule their published one.

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
        if not normalize:
            variant = _with_feature_map_of_normalized(variant)
        if condition(variant):
            variants.append(variant)
            if mean_scale and not normalize and causality != "causal":
                variants += filter(_can_be_built, [_with_mean_scale(variant, label)])
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
    return not _create_small(variant).traits.permutation_equivariant


def effective_feature_map(variant: Variant) -> str | None:
    """Return the name of the feature map that a variant computes with.

    None if its mixer has none, or cannot be built with the variant's options, which its cell will report.
    """
    try:
        mixer = _create_small(variant)
    except ValueError:
        return None
    return mixer.feature_map_name(mixer.config)


def has_own_feature_map(variant: Variant) -> bool:
    """Whether a variant's feature map is its mixer's default, or what that default becomes when it is normalized."""
    if "feature_map" not in variant.options:
        return True
    return effective_feature_map(variant) == _feature_map_of_normalized(variant)


def _create_small(variant: Variant) -> TokenMixer:
    """Return the mixer of a variant as an adapter mounts it, with 8 channels."""
    return create_mixer(
        variant.mixer,
        8,
        2,
        causality=variant.causality,
        normalize=variant.normalize,
        own_projections=False,
        **variant.options,
    )


def _feature_map_of_normalized(variant: Variant) -> str | None:
    """The default feature map of a variant's mixer when it is normalized; None if it has none or cannot be."""
    entry = registry.get_mixer_entry(variant.mixer)
    if True not in entry.normalizations:
        return None
    options = {name: value for name, value in variant.options.items() if name not in ("feature_map", "scale")}
    return effective_feature_map(variant.model_copy(update={"normalize": True, "options": options}))


def _can_be_built(variant: Variant) -> bool:
    try:
        _create_small(variant)
    except ValueError:
        return False
    return True


def _with_feature_map_of_normalized(variant: Variant) -> Variant:
    """Give a variant the option `feature_map` if its default is another one than that of the normalized mixer."""
    positive = _feature_map_of_normalized(variant)
    if positive is None or "feature_map" in variant.options or positive == effective_feature_map(variant):
        return variant
    return variant.model_copy(update={"options": {**variant.options, "feature_map": positive}})


def _with_mean_scale(variant: Variant, label: str) -> Variant:
    causality = CAUSALITY_LABELS[variant.causality or "noncausal"]
    return variant.model_copy(
        update={
            "name": f"{variant.mixer}_{variant.causality}_mean_scale",
            "label": f'{label}, {causality}, scale="mean"',
            "options": {**variant.options, "scale": "mean"},
        }
    )
