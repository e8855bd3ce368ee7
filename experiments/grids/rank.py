"""The generalized low-rank form at rank r of F Gᵀ (2409.02097 §3.3): features and state grow r times."""

from experiments.config import Grid, Variant
from experiments.grids.shared import EVALUATION, SEEDS, controls, recommended_distillation

PLAN = recommended_distillation()

GRID = Grid(
    name="rank",
    question="How large a rank does the generalized low-rank form of linear attention need?",
    variants=(
        *controls(PLAN),
        *(
            Variant(name=f"rank_{rank}", label=f"rank {rank}", mixer="linfusion_low_rank", options={"rank": rank})
            for rank in (1, 2, 4, 8, 16, 32, 64)
        ),
        Variant(name="linfusion", label="LinFusion: no F and G", mixer="linfusion"),
    ),
    seeds=SEEDS,
    reference="linfusion",
    distillation=PLAN,
    evaluation=EVALUATION,
)
