"""What is it worth to start from the teacher's own q, k, v and output projections, and to train them?"""

from typing import Any

from experiments.config import Grid, Variant
from experiments.grids import EVALUATION, SEEDS, SOFTMAX, ours

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

GRID = Grid(
    name="init",
    question="Should a student start from the teacher's projections or from random ones, and should they be trained?",
    variants=(
        SOFTMAX,
        *(
            Variant(
                name=f"{mixer}_{start}",
                label=f"{label}: {told}",
                mixer=mixer,
                distillation=ours().model_copy(update=plan),
                **choice,
            )
            for mixer, (label, choice) in _MIXERS.items()
            for start, (told, plan) in _STARTS.items()
            if (mixer, start) != ("linear_attention", "frozen")  # which would have nothing to train
        ),
    ),
    seeds=SEEDS,
    distillation=ours(),
    evaluation=EVALUATION,
)
