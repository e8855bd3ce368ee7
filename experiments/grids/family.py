"""Which family of linear mixers is best for images, with which causality, and normalized or not?

Mixers are in their drop-in forms, which start from the teacher's projections. The published GLA has no constant for the
number of tokens and tames its sums with RMSNorm, which the drop-in form leaves out: not normalized, its first error is
10⁵ times the others', and after the 110 steps of the default it is still on its way.
"""

from experiments.ablation.product import distinct, product
from experiments.config import Grid
from experiments.grids import EVALUATION, PAPER, SEEDS, SOFTMAX, ours

GRID = Grid(
    name="family",
    question="Which family of linear mixers is best for images, and do order and normalization matter to all?",
    variants=(
        SOFTMAX,
        *product(
            {
                "linfusion": "LinFusion",
                "linear_attention": "linear attention",
                "mamba2": "Mamba-2",
                "gla": "GLA",
                "mamba": "Mamba",
            },
            keep=distinct,
        ),
    ),
    seeds=SEEDS,
    reference="linear_attention_noncausal_normalized",
    claims=PAPER,
    distillation=ours(),
    evaluation=EVALUATION,
)
