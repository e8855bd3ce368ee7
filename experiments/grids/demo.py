"""Which features of a linear mixer matter for images? Normalization × causality, within ten minutes on two cores."""

from experiments.config import DistillationConfig, EvaluationConfig, FitConfig, Grid, ImageMetricsConfig, Variant
from experiments.grids import PAPER, SOFTMAX

_LINEAR = [
    Variant(
        name=f"linear_{causality}_{'normalized' if normalize else 'unnormalized'}",
        label=f"linear attention, {causality}, {'normalized' if normalize else 'not normalized'}",
        mixer="linear_attention",
        causality=causality,
        normalize=normalize,
    )
    for causality in ("noncausal", "causal")
    for normalize in (True, False)
]

GRID = Grid(
    name="demo",
    question="Which features of a linear mixer matter for images: attention normalization, or causality?",
    variants=(
        SOFTMAX,
        Variant(name="linfusion", label="LinFusion", mixer="linfusion"),
        *_LINEAR,
        Variant(name="linfusion_unnormalized", label="LinFusion, not normalized", mixer="linfusion", normalize=False),
        Variant(name="linfusion_causal", label="LinFusion, causal", mixer="linfusion", causality="causal"),
    ),
    seeds=(0,),
    claims=PAPER,
    distillation=DistillationConfig(
        fit=FitConfig(steps=80, batch_size=16, learning_rate=1e-3, warmup=10, checkpoint_every=20),
        calibrate_outputs=True,
    ),
    evaluation=EvaluationConfig(  # what ten minutes allow
        sizes=(64, 128, 256),
        shapes=(),
        metrics=ImageMetricsConfig(images=0),
        sample_steps=12,
        prompts=(
            "red apple, teal background",
            "blue heart, yellow background",
            "full moon, black background",
            "cat face, purple background",
        ),
    ),
)
