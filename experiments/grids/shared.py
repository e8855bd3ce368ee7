"""What the ready-made grids share: training plans, the evaluation, claims, and the controls that every grid carries.

The plans are for the embedded teacher: about two and a half minutes of training for each cell on one CPU core.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from experiments.ablation.variants import CAUSALITY_LABELS
from experiments.config import (
    Claim,
    DistillationConfig,
    EvaluationConfig,
    FitConfig,
    GeneratedImagesConfig,
    LossTerm,
    PlannedComparison,
    TrainingStage,
    Variant,
)
from mixers.traits import Causality

SEEDS = (0, 1, 2, 3, 4)
UNTOUCHED_SOFTMAX = Variant(name="softmax", label="softmax, untouched", mixer="softmax", trained=False)
"""The sanity row: the teacher's own attention, mounted and not trained, whose error must be zero."""


def fit_config(steps: int, rate: float = 1e-3, batch_size: int = 16, warmup: int = 10) -> FitConfig:
    """Return a stage's training."""
    return FitConfig(
        steps=steps, batch_size=batch_size, learning_rate=rate, warmup=warmup, checkpoint_every=50, log_every=5
    )


def loss_terms(**weights: float) -> dict[str, LossTerm]:
    """Return objectives by name, with constant weights."""
    return {name: LossTerm(weight=weight) for name, weight in weights.items()}


def local_stage(steps: int, batch_size: int = 16) -> TrainingStage:
    """Return a stage that trains every site by itself, on the teacher's own tokens."""
    return TrainingStage(name="local", objectives=loss_terms(local=1.0), fit=fit_config(steps, 3e-3, batch_size))


def recommended_distillation(
    local_steps: int = 60, steps: int = 50, before: tuple[TrainingStage, ...] = (), rate: float = 1e-3
) -> DistillationConfig:
    """Return the plan that the grid `objectives` recommends: site by site, then output + features/2 end to end.

    Args:
        local_steps: of the stage that trains site by site.
        steps: of the stage that trains end to end.
        before: stages that come first.
        rate: learning rate of the last stage; three times that site by site.
    """
    local = local_stage(local_steps)
    local = local.model_copy(update={"fit": fit_config(local_steps, 3 * rate)})
    return DistillationConfig(
        before=(*before, local),
        objectives=loss_terms(output=1.0, features=0.5),
        fit=fit_config(steps, rate),
        images=1024,
        calibrate_outputs=True,
    )


def train_at_sizes(plan: DistillationConfig, sizes: tuple[int, ...]) -> DistillationConfig:
    """Return the plan with every stage training at these sizes in pixels, alternating step by step."""
    before = tuple(stage.model_copy(update={"sizes": sizes}) for stage in plan.before)
    return plan.model_copy(update={"before": before, "sizes": sizes})


def controls(plan: DistillationConfig) -> tuple[Variant, ...]:
    """Return the rows that every grid carries, because differences between mixers mean nothing without them.

    - the untouched softmax, whose error must be zero;
    - softmax attention with random projections, distilled with the grid's plan: the error that the plan itself leaves;
    - `identity` (W = I) and `uniform` (W = 1/l), which do not mix tokens by their content;
    - `identity` with a 3 × 3 convolution, which mixes neighbors alone.

    Args:
        plan: the grid's distillation.
    """
    return (
        UNTOUCHED_SOFTMAX,
        Variant(
            name="softmax_distilled",
            label="softmax, random projections",
            mixer="softmax",
            control="teacher",
            distillation=plan.model_copy(
                update={"start": "random", "train": "new+projections", "calibrate_outputs": False}
            ),
        ),
        Variant(name="identity", label="identity: no mixing", mixer="identity", control="no mixing"),
        Variant(name="uniform", label="uniform: the mean of all tokens", mixer="uniform", control="fixed mixing"),
        Variant(
            name="identity_convolution",
            label="identity, 3 × 3 convolution",
            mixer="identity",
            control="fixed mixing",
            options={"local_conv_size": 3},
        ),
    )


def signed_variants(mixers: Mapping[str, str], causality: Causality) -> tuple[Variant, ...]:
    """Return unnormalized variants with signed features, as GLA, Mamba and the delta rule were published.

    Args:
        mixers: {registered name: its name in labels}.
        causality: of all variants.
    """
    return tuple(
        Variant(
            name=f"{mixer}_signed",
            label=f"{label}, {CAUSALITY_LABELS[causality]}, not normalized, signed",
            mixer=mixer,
            causality=causality,
            normalize=False,
            options={"feature_map": "identity"},
        )
        for mixer, label in mixers.items()
    )


def signed_comparisons(mixers: Iterable[str], causality: Causality) -> tuple[PlannedComparison, ...]:
    """Return comparisons of `signed_variants` with the unnormalized variants of `combine_variants`."""
    return tuple(
        PlannedComparison(
            name="signed features, as published", above=f"{mixer}_signed", below=f"{mixer}_{causality}_unnormalized"
        )
        for mixer in mixers
    )


NORMALIZATION_MATTERS = Claim(
    statement="Normalization matters at resolutions not trained on",
    factor="normalization",
    value="not normalized",
    worse=True,
    beyond=True,
)
NONCAUSAL_IS_BETTER = Claim(
    statement="Non-causal mixers beat causal ones", factor="causality", value="causal", worse=True
)
LEARNED_MAPS_ARE_BETTER = Claim(
    statement="LinFusion's learned maps beat plain linear attention", factor="mixer", value="linfusion", worse=False
)
PAPER_CLAIMS = (NORMALIZATION_MATTERS, NONCAUSAL_IS_BETTER, LEARNED_MAPS_ARE_BETTER)
"""What LinFusion's paper (2409.02097) reports; the third for grids whose reference row is plain linear attention."""

EVALUATION = EvaluationConfig(
    shapes=(),
    sample_steps=12,
    prompts=("a red apple, teal background", "three of the same, yellow background"),
    generated=GeneratedImagesConfig(images=0),
    metrics={
        "fidelity": {},
        "timesteps": {},
        "sites": {"sizes": (64,)},
        "cost": {"sizes": (64, 128, 256)},
    },
)
"""64 held-out and 64 held-in images, 9 timesteps; no generated images, which take minutes for each cell, and no shapes
but squares."""
