"""How should a student be distilled? Objectives on and off, and the published plan.

Every row has the same images and seeds, and as many steps as take about 70 seconds of one core. A step of batch 16,
measured on a 2.6 GHz EPYC: noise 0.36 s, with any of the teacher's terms 0.48 s, matrix 0.35 s, local 0.27 s (no
gradient passes through the UNet); a step of batch 96 takes 2.8 s.
"""

from experiments.config import DistillationConfig, EvaluationConfig, Grid, TrainingStage, Variant
from experiments.grids.shared import EVALUATION, SEEDS, controls, fit_config, loss_terms, recommended_distillation

_PUBLISHED = loss_terms(noise=1.0, output=0.5, features=0.5)
_IMAGES = 1024


def _row(name: str, label: str, plan: DistillationConfig) -> Variant:
    return Variant(name=name, label=label, mixer="linfusion", distillation=plan)


def _one(steps: int, **weights: float) -> DistillationConfig:
    return DistillationConfig(
        objectives=loss_terms(**weights), fit=fit_config(steps), images=_IMAGES, calibrate_outputs=True
    )


_MATRIX = TrainingStage(name="matrix", objectives=loss_terms(matrix=1.0), fit=fit_config(30, 3e-3))

PLAN = DistillationConfig(fit=fit_config(146), images=_IMAGES, calibrate_outputs=True)

GRID = Grid(
    name="objectives",
    question="How should a student be distilled: with which objectives, from which start, in which order?",
    variants=(
        *controls(PLAN),
        _row(
            "published",
            "published: all three terms, random q, k, v, batch 96, rate 1e-4",
            DistillationConfig(start="random", objectives=_PUBLISHED, fit=fit_config(25, 1e-4, 96, 0), images=_IMAGES),
        ),
        _row(
            "published_small_batches",
            "all three terms, random q, k, v",
            DistillationConfig(start="random", objectives=_PUBLISHED, fit=fit_config(146), images=_IMAGES),
        ),
        _row("all_terms", "noise + output/2 + features/2", _one(146, noise=1.0, output=0.5, features=0.5)),
        _row("noise", "noise", _one(194, noise=1.0)),
        _row("output", "output", _one(146, output=1.0)),
        _row("features", "features", _one(146, features=1.0)),
        _row("output_features", "output + features/2", _one(146, output=1.0, features=0.5)),
        _row("noise_output", "noise + output/2", _one(146, noise=1.0, output=0.5)),
        _row("local", "local", _one(260, local=1.0)),
        _row("local_output", "local, then output + features/2", recommended_distillation(100, 88)),
        _row(
            "matrix_local",
            "matrix, local, then output + features/2",
            recommended_distillation(80, 77, before=(_MATRIX,)),
        ),
    ),
    seeds=SEEDS,
    reference="all_terms",
    distillation=PLAN,
    evaluation=EvaluationConfig.model_validate(
        {
            **EVALUATION.model_dump(),
            "shapes": (),
            "sample_sizes": (64,),
            "metrics": {**EVALUATION.metrics, "cost": {"sizes": (64,), "repeats": 1}},
        }
    ),
)
