"""Linear mixers made for images, each with its published causality.

Mixers are in their drop-in forms, which start from the teacher's projections. Where the paper adds a convolution of the
values over the image, a second row has it. VSSD and Hydra are normalized: as published they have a norm behind them,
which the drop-in form leaves out, and without either they start 10³ to 10⁵ times as far from the teacher as the others.
"""

from experiments.config import Grid, Variant
from experiments.grids.shared import EVALUATION, SEEDS, controls, recommended_distillation

_MIXERS = {
    "linfusion": "LinFusion",
    "linear_attention": "linear attention",
    "sana_relu": "Sana's ReLU attention",
    "focused": "FLatten, focused",
    "mila": "MILA",
    "inline": "InLine",
    "vssd": "VSSD, normalized",
    "hydra": "Hydra, normalized",
    "gated_deltanet": "Gated DeltaNet",
}

PLAN = recommended_distillation()

GRID = Grid(
    name="vision",
    question="Which of the linear mixers made for images is best in place of softmax attention?",
    variants=(
        *controls(PLAN),
        *(
            Variant(name=mixer, label=label, mixer=mixer, normalize=True if mixer in ("vssd", "hydra") else None)
            for mixer, label in _MIXERS.items()
        ),
        *(
            Variant(
                name=f"{mixer}_convolution",
                label=f"{_MIXERS[mixer]}, with its convolution",
                mixer=mixer,
                options={"local_conv_size": None},
            )
            for mixer in ("focused", "mila", "inline")
        ),
        Variant(
            name="gated_deltanet_bidirectional",
            label="Gated DeltaNet, bidirectional",
            mixer="gated_deltanet",
            causality="bidirectional",
        ),
    ),
    seeds=SEEDS,
    reference="linfusion",
    distillation=PLAN,
    evaluation=EVALUATION,
)
