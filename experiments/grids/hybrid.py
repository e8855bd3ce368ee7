"""How much softmax attention should stay, and where? LinFusion at some sites, the teacher's attention at the others.

Training alternates between two sizes, so that with `min_tokens` every site is trained at a size at which it is linear.
"""

from experiments.config import Grid, Variant
from experiments.grids.shared import EVALUATION, SEEDS, controls, recommended_distillation, train_at_sizes

_LINEAR: dict[str, tuple[str, str | tuple[str, ...]]] = {
    "all": ("no softmax", "all"),
    "not_mid": ("softmax in the mid block", "*_blocks.*"),
    "not_down": ("softmax in the down blocks", ("mid_block", "up_blocks.*")),
    "not_up": ("softmax in the up blocks", ("down_blocks.*", "mid_block")),
    "down": ("linear in the down blocks alone", "down_blocks.*"),
    "up": ("linear in the up blocks alone", "up_blocks.*"),
    "mid": ("linear in the mid block alone", "mid_block"),
    "half": ("linear at every 2nd site", "every:2"),
    "third": ("linear at every 3rd site", "every:3"),
}

PLAN = train_at_sizes(recommended_distillation(30, 30), (64, 64, 64, 128))

GRID = Grid(
    name="hybrid",
    question="How many sites should keep softmax attention, and which: the outer ones, or those with few tokens?",
    variants=(
        *controls(PLAN),
        *(
            Variant(name=name, label=label, mixer="linfusion", select=select)
            for name, (label, select) in _LINEAR.items()
        ),
        *(
            Variant(
                name=f"min_tokens_{tokens}",
                label=f"softmax below {tokens} tokens",
                mixer="linfusion",
                min_tokens=tokens,
            )
            for tokens in (128, 256)
        ),
    ),
    seeds=SEEDS,
    reference="all",
    distillation=PLAN,
    evaluation=EVALUATION,
)
