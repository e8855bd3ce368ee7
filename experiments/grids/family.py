"""Which family of linear mixers is best for images, with which causality, and normalized or not?

Mixers are in their drop-in forms, which start from the teacher's projections. The published GLA has no constant for the
number of tokens and limits its sums with RMSNorm, which the drop-in form leaves out: unnormalized, its first error is
10⁵ times the others', and after the 110 steps of the default it is still falling. Effects are pooled over fixed pairs,
so this row counts in them; the table of factors lists every pair.

Normalized rows need a positive feature map, and the unnormalized rows have the same one. GLA, Mamba and Mamba-2 as
published are signed: one more row each shows what the map contributes.
"""

from experiments.ablation.variants import combine_variants, is_distinct
from experiments.config import Grid
from experiments.grids.shared import (
    EVALUATION,
    PAPER_CLAIMS,
    SEEDS,
    controls,
    recommended_distillation,
    signed_comparisons,
    signed_variants,
)

PLAN = recommended_distillation()
SIGNED = {"mamba2": "Mamba-2", "gla": "GLA", "mamba": "Mamba"}
"""Mixers whose published feature map is the identity."""

GRID = Grid(
    name="family",
    question="Which family of linear mixers is best for images, and do order and normalization matter to all?",
    variants=(
        *controls(PLAN),
        *combine_variants(
            {
                "linfusion": "LinFusion",
                "linear_attention": "linear attention",
                "mamba2": "Mamba-2",
                "gla": "GLA",
                "mamba": "Mamba",
            },
            condition=is_distinct,
            mean_scale=True,
        ),
        *signed_variants(SIGNED, "bidirectional"),
    ),
    seeds=SEEDS,
    reference="linear_attention_noncausal_normalized",
    claims=PAPER_CLAIMS,
    comparisons=signed_comparisons(SIGNED, "bidirectional"),
    distillation=PLAN,
    evaluation=EVALUATION,
)
