"""Does the order of the mixers depend on how long, and at which learning rate, they are trained?

Every main row at 70, 300, 1,000 and 3,000 steps, half of them site by site, and at three learning rates at 300 steps.
The report states whether ranks are stable.
"""

from experiments.config import Grid, Variant
from experiments.grids.shared import EVALUATION, SEEDS, UNTOUCHED_SOFTMAX, controls, recommended_distillation

STEPS = (70, 300, 1000, 3000)
RATES = (3e-4, 1e-3, 3e-3)
MAIN_RATE = 1e-3
PLANS = {
    f"{steps}_steps": (f"{steps:,} steps", recommended_distillation(steps // 2, steps - steps // 2)) for steps in STEPS
} | {
    f"rate_{rate:.0e}": (f"300 steps, rate {rate:g}", recommended_distillation(150, 150, rate=rate))
    for rate in RATES
    if rate != MAIN_RATE
}


def _main_rows(suffix: str, label: str, plan: object) -> list[Variant]:
    rows = [
        *controls(plan)[1:],  # type: ignore[arg-type]
        Variant(name="linfusion", label="LinFusion", mixer="linfusion"),
        Variant(name="linear_attention", label="linear attention", mixer="linear_attention"),
        Variant(
            name="linear_attention_unnormalized",
            label="linear attention, not normalized",
            mixer="linear_attention",
            normalize=False,
        ),
        Variant(
            name="linear_attention_mean_scale",
            label='linear attention, scale="mean"',
            mixer="linear_attention",
            normalize=False,
            options={"scale": "mean"},
        ),
        Variant(name="mamba2", label="Mamba-2, bidirectional", mixer="mamba2", causality="bidirectional"),
    ]
    return [
        row.model_copy(
            update={
                "name": f"{row.name}_{suffix}",
                "label": f"{row.label}, {label}",
                "distillation": row.distillation or plan,
            }
        )
        for row in rows
    ]


GRID = Grid(
    name="duration",
    question="Does the order of the mixers depend on the number of training steps and the learning rate?",
    variants=(
        UNTOUCHED_SOFTMAX,
        *(row for suffix, (label, plan) in PLANS.items() for row in _main_rows(suffix, label, plan)),
    ),
    seeds=SEEDS[:3],
    reference="linear_attention_300_steps",
    distillation=PLANS["300_steps"][1],
    evaluation=EVALUATION,
)
