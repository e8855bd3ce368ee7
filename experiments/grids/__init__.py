"""Ready-made grids: one plain Python file per question, each exposing `GRID`; and what they share.

The defaults are for the embedded teacher: about 40 seconds of training a cell on one core of a CPU.
"""

from __future__ import annotations

from experiments.config import Claim, DistillationConfig, EvaluationConfig, FitConfig, LossTerm, TrainingStage, Variant

SEEDS = (0, 1, 2)
SOFTMAX = Variant(name="softmax", label="softmax, untouched", mixer="softmax", trained=False)
"""The sanity row: the teacher's own attention, mounted and not trained, whose error must be zero."""


def fit(steps: int, rate: float = 1e-3, batch_size: int = 16, warmup: int = 10) -> FitConfig:
    """A stage's training."""
    return FitConfig(
        steps=steps, batch_size=batch_size, learning_rate=rate, warmup=warmup, checkpoint_every=50, log_every=5
    )


def terms(**weights: float) -> dict[str, LossTerm]:
    """Objectives by name, with constant weights."""
    return {name: LossTerm(weight=weight) for name, weight in weights.items()}


def local(steps: int) -> TrainingStage:
    """Each mixer on the teacher's own tokens, every site by itself."""
    return TrainingStage(name="local", objectives=terms(local=1.0), fit=fit(steps, 3e-3))


def ours(local_steps: int = 60, steps: int = 50, before: tuple[TrainingStage, ...] = ()) -> DistillationConfig:
    """What `objectives` found good: site by site, then output + features/2 end to end; after `before`, if any."""
    return DistillationConfig(
        before=(*before, local(local_steps)),
        objectives=terms(output=1.0, features=0.5),
        fit=fit(steps),
        images=1024,
        calibrate_outputs=True,
    )


def at_sizes(plan: DistillationConfig, sizes: tuple[int, ...]) -> DistillationConfig:
    """The plan with every stage training at these sizes in pixels, step by step in turn."""
    before = tuple(stage.model_copy(update={"sizes": sizes}) for stage in plan.before)
    return plan.model_copy(update={"before": before, "sizes": sizes})


PAPER = (
    Claim(
        statement="Normalization matters at resolutions not trained on",
        factor="normalization",
        value="not normalized",
        worse=True,
        beyond=True,
    ),
    Claim(statement="Non-causal mixers beat causal ones", factor="causality", value="causal", worse=True),
    Claim(
        statement="LinFusion's learned maps beat plain linear attention", factor="mixer", value="linfusion", worse=False
    ),
)
"""What LinFusion's paper (2409.02097) found; the third for grids whose reference row is plain linear attention."""

EVALUATION = EvaluationConfig(
    sample_steps=12,
    prompts=("red apple, teal background", "cat face, purple background"),
    speed_sizes=(64, 128, 256),
)
