"""In which order should a mixer with an order read an image? `cross` reads it twice and costs twice as much."""

from experiments.config import Grid, Variant
from experiments.grids.shared import EVALUATION, SEEDS, controls, recommended_distillation
from mixers.stages.scan_orders import SCANS

_MIXERS = {
    "mamba2": ("Mamba-2", "bidirectional"),
    "mamba2_causal": ("causal Mamba-2", "causal"),
}

PLAN = recommended_distillation()

GRID = Grid(
    name="scan",
    question="In which order should the tokens of an image be read: row by row, column by column, or along a curve?",
    variants=(
        *controls(PLAN),
        *(
            Variant(
                name=f"{name}_{scan}",
                label=f"{label}, {scan}",
                mixer="mamba2",
                causality=causality,
                normalize=True,
                options={"scan": scan},
            )
            for name, (label, causality) in _MIXERS.items()
            for scan in SCANS
        ),
        Variant(name="linfusion", label="LinFusion: no order", mixer="linfusion"),
    ),
    seeds=SEEDS,
    reference=f"mamba2_{next(iter(SCANS))}",
    distillation=PLAN,
    evaluation=EVALUATION,
)
