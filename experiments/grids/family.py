"""Which family of linear mixers is best for images, with which causality, and normalized or not?

Mixers are in their drop-in forms, which start from the teacher's projections. The published GLA has no constant for the
number of tokens and limits its sums with RMSNorm, which the drop-in form leaves out: not normalized, its first error is
10⁵ times the others', and after the 110 steps of the default it is still falling. Effects are pooled over fixed pairs,
so that this row counts in them; the table of factors has every pair by itself.
"""

from experiments.ablation.variants import combine_variants, is_distinct
from experiments.config import Grid
from experiments.grids.shared import EVALUATION, PAPER_CLAIMS, SEEDS, controls, recommended_distillation

PLAN = recommended_distillation()

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
    ),
    seeds=SEEDS,
    reference="linear_attention_noncausal_normalized",
    claims=PAPER_CLAIMS,
    distillation=PLAN,
    evaluation=EVALUATION,
)
