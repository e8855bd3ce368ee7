"""What is it worth to start from the teacher's own q, k, v and output projections, and to train them?"""

from typing import Any

from experiments.config import Grid, Variant
from experiments.grids.shared import EVALUATION, SEEDS, controls, recommended_distillation

_STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "host": ("the teacher's projections", {}),
    "random": ("random projections", {"start": "random", "calibrate_outputs": False}),
    "frozen": ("the teacher's projections, not trained", {"train": "new"}),
}
_MIXERS = {
    "linfusion": ("LinFusion", {}),
    "linear_attention": ("linear attention", {}),
    "mamba2": ("Mamba-2", {"causality": "bidirectional", "normalize": True}),
}
PLAN = recommended_distillation()

GRID = Grid(
    name="init",
    question="Should a student start from the teacher's projections or from random ones, and should they be trained?",
    variants=(
        *controls(PLAN),
        *(
            Variant(
                name=f"{mixer}_{start}",
                label=f"{label}: {description}",
                mixer=mixer,
                distillation=PLAN.model_copy(update=changes),
                **fields,
            )
            for mixer, (label, fields) in _MIXERS.items()
            for start, (description, changes) in _STARTS.items()
            if (mixer, start) != ("linear_attention", "frozen")  # it would have nothing to train
        ),
    ),
    seeds=SEEDS,
    reference="linfusion_host",
    distillation=PLAN,
    evaluation=EVALUATION,
)
