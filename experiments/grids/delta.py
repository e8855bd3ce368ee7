"""Does erasing help: the delta rule, with every causality, normalized or not, against the same mixers without it?

Gated DeltaNet is Mamba-2's recurrence with the delta rule, and KDA is GLA's. SANA-WM (2605.15178) ships the
bidirectional, normalized form. Linear attention, without decay and without erasing, is the reference.

Unnormalized rows have the positive map of the normalized ones; one row each has the signed features of the papers. The
delta rule needs no constant for the number of tokens, because erasing bounds its state.
"""

from experiments.ablation.variants import combine_variants
from experiments.config import Grid, PlannedComparison, Variant
from experiments.grids.shared import (
    EVALUATION,
    SEEDS,
    controls,
    recommended_distillation,
    signed_comparisons,
    signed_variants,
)

PLAN = recommended_distillation()
_DELTA_MIXERS = {"gated_deltanet": "Gated DeltaNet", "kda": "KDA"}

GRID = Grid(
    name="delta",
    question="Does erasing before writing help, and do order, decay and normalization matter to the delta rule?",
    variants=(
        *controls(PLAN),
        *combine_variants(_DELTA_MIXERS),
        *signed_variants(_DELTA_MIXERS, "causal"),
        Variant(
            name="deltanet_bidirectional_normalized",
            label="DeltaNet, without decay, bidirectional, normalized",
            mixer="gated_deltanet",
            causality="bidirectional",
            normalize=True,
            options={"decay": False},
        ),
        *(
            Variant(
                name=f"{mixer}_bidirectional_normalized",
                label=f"{label}, bidirectional, normalized",
                mixer=mixer,
                causality="bidirectional",
                normalize=True,
            )
            for mixer, label in (("mamba2", "Mamba-2"), ("gla", "GLA"))
        ),
        Variant(name="linear_attention", label="linear attention", mixer="linear_attention"),
    ),
    seeds=SEEDS[:3],
    reference="linear_attention",
    comparisons=(
        *signed_comparisons(_DELTA_MIXERS, "causal"),
        PlannedComparison(
            name="the delta rule, one gate per head",
            above="gated_deltanet_bidirectional_normalized",
            below="mamba2_bidirectional_normalized",
        ),
        PlannedComparison(
            name="the delta rule, one gate per channel",
            above="kda_bidirectional_normalized",
            below="gla_bidirectional_normalized",
        ),
    ),
    distillation=PLAN,
    evaluation=EVALUATION,
)
