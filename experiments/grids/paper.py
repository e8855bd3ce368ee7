"""Do the two findings of LinFusion's paper hold: normalization, and non-causal inference?

The rows that answer it for linear attention and LinFusion, with the controls that every grid has. They are a part of
`family`, and the same cells; few enough for three seeds in four hours on two cores.
"""

from experiments.ablation.variants import combine_variants
from experiments.config import Grid, Variant
from experiments.grids.shared import EVALUATION, PAPER_CLAIMS, SEEDS, controls, recommended_distillation

PLAN = recommended_distillation()


def _is_asked(variant: Variant) -> bool:
    """Whether a row belongs to the question: causal rows are compared with the normalized non-causal ones alone."""
    return variant.causality == "noncausal" or bool(variant.normalize)


GRID = Grid(
    name="paper",
    question="Do the paper's two findings, attention normalization and non-causal inference, hold beside controls?",
    variants=(
        *controls(PLAN),
        *combine_variants(
            {"linfusion": "LinFusion", "linear_attention": "linear attention"},
            causalities=("noncausal", "causal"),
            condition=_is_asked,
            mean_scale=True,
        ),
    ),
    seeds=SEEDS[:3],
    reference="linear_attention_noncausal_normalized",
    claims=PAPER_CLAIMS,
    distillation=PLAN,
    evaluation=EVALUATION,
)
