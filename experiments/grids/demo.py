"""Which features of a linear mixer matter for images? Normalization × causality, in about 13 minutes on two cores."""

from experiments.ablation.variants import combine_variants
from experiments.config import (
    DistillationConfig,
    EvaluationConfig,
    GeneratedImagesConfig,
    Grid,
    Variant,
)
from experiments.grids.shared import PAPER_CLAIMS, controls, fit_config, local_stage, loss_terms

PLAN = DistillationConfig(
    before=(local_stage(80, batch_size=8),),
    objectives=loss_terms(output=1.0, features=0.5),
    fit=fit_config(40, 1e-3, batch_size=8),
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
        Variant(
            name="linfusion_mean_scale",
            label='LinFusion, scale="mean"',
            mixer="linfusion",
            normalize=False,
            options={"scale": "mean"},
        ),
        Variant(name="linfusion_causal", label="LinFusion, causal", mixer="linfusion", causality="causal"),
    ),
    seeds=(0,),
    reference="linear_attention_noncausal_normalized",
    claims=PAPER_CLAIMS,
    distillation=PLAN,
    evaluation=EvaluationConfig(  # short; the other grids evaluate more images and timesteps
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
