"""Which features of a linear mixer matter for images? Normalization × causality, within ten minutes on two cores."""

from experiments.ablation.variants import combine_variants
from experiments.config import DistillationConfig, EvaluationConfig, FitConfig, GeneratedImagesConfig, Grid, Variant
from experiments.grids.shared import PAPER_CLAIMS, controls

PLAN = DistillationConfig(
    fit=FitConfig(steps=60, batch_size=8, learning_rate=1e-3, warmup=10, checkpoint_every=20),
    images=512,
    calibrate_outputs=True,
)

GRID = Grid(
    name="demo",
    question="Which features of a linear mixer matter for images: attention normalization, or causality?",
    variants=(
        *controls(PLAN),
        Variant(name="linfusion", label="LinFusion", mixer="linfusion"),
        *combine_variants(
            {"linear_attention": "linear attention"}, causalities=("noncausal", "causal"), mean_scale=True
        ),
        Variant(name="linfusion_unnormalized", label="LinFusion, not normalized", mixer="linfusion", normalize=False),
        Variant(name="linfusion_causal", label="LinFusion, causal", mixer="linfusion", causality="causal"),
    ),
    seeds=(0,),
    reference="linear_attention_noncausal_normalized",
    claims=PAPER_CLAIMS,
    distillation=PLAN,
    evaluation=EvaluationConfig(  # what ten minutes allow; the other grids evaluate more images and timesteps
        shapes=(),
        images=6,
        held_in_images=0,
        timesteps=(100, 500, 950),
        generated=GeneratedImagesConfig(images=0),
        sample_steps=10,
        prompts=(
            "a red apple, teal background",
            "three of the same, yellow background",
            "a repeated pattern, blue background",
        ),
        metrics={"fidelity": {}, "timesteps": {}, "sites": {"images": 2, "sizes": (64,)}, "cost": {"sizes": (64, 256)}},
    ),
)
