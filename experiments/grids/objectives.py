"""How should a student be distilled? Objectives on and off, and the published recipe against ours.

Every row has the same pictures and seeds and, by its number of steps, about the same 70 seconds of one core. A step
of batch 16, measured on a 2.6 GHz EPYC: noise 0.36 s, with any of the teacher's terms 0.48 s, matrix 0.35 s, local
0.27 s (no gradient goes through the UNet); a step of batch 96 is 2.8 s.
"""

from experiments.config import Distillation, Evaluation, Grid, Stage, Term, Variant
from experiments.training import FitConfig


def _fit(steps: int, rate: float = 1e-3, batch_size: int = 16, warmup: int = 10) -> FitConfig:
    return FitConfig(
        steps=steps, batch_size=batch_size, learning_rate=rate, warmup=warmup, checkpoint_every=50, log_every=5
    )


def _terms(**weights: float) -> dict[str, Term]:
    return {name: Term(weight=weight) for name, weight in weights.items()}


_PUBLISHED = _terms(noise=1.0, output=0.5, features=0.5)
_IMAGES = 1024


def _row(name: str, label: str, plan: Distillation) -> Variant:
    return Variant(name=name, label=label, mixer="linfusion", distillation=plan)


def _one(steps: int, **weights: float) -> Distillation:
    return Distillation(objectives=_terms(**weights), fit=_fit(steps), images=_IMAGES)


_LOCAL = Stage(name="local", objectives=_terms(local=1.0), fit=_fit(100, 3e-3))
_MATRIX = Stage(name="matrix", objectives=_terms(matrix=1.0), fit=_fit(30, 3e-3))
_END_TO_END = {"objectives": _terms(output=1.0, features=0.5), "images": _IMAGES}

GRID = Grid(
    name="objectives",
    question="How should a student be distilled: with which objectives, from which start, in which order?",
    variants=(
        Variant(name="softmax", label="softmax, untouched", mixer="softmax", trained=False),
        _row(
            "published",
            "published: all three terms, random q, k, v, batch 96, rate 1e-4",
            Distillation(start="random", objectives=_PUBLISHED, fit=_fit(25, 1e-4, 96, 0), images=_IMAGES),
        ),
        _row(
            "published_small_batches",
            "all three terms, random q, k, v",
            Distillation(start="random", objectives=_PUBLISHED, fit=_fit(146), images=_IMAGES),
        ),
        _row("all_terms", "noise + output/2 + features/2", _one(146, noise=1.0, output=0.5, features=0.5)),
        _row("noise", "noise", _one(194, noise=1.0)),
        _row("output", "output", _one(146, output=1.0)),
        _row("features", "features", _one(146, features=1.0)),
        _row("output_features", "output + features/2", _one(146, output=1.0, features=0.5)),
        _row("noise_output", "noise + output/2", _one(146, noise=1.0, output=0.5)),
        _row("local", "local", _one(260, local=1.0)),
        _row(
            "ours",
            "ours: local, then output + features/2",
            Distillation(before=(_LOCAL,), fit=_fit(88), **_END_TO_END),
        ),
        _row(
            "matrix_local",
            "matrix, local, then output + features/2",
            Distillation(
                before=(_MATRIX, _LOCAL.model_copy(update={"fit": _fit(80, 3e-3)})), fit=_fit(77), **_END_TO_END
            ),
        ),
    ),
    seeds=(0, 1, 2),
    distillation=Distillation(fit=_fit(146), images=_IMAGES),
    evaluation=Evaluation(
        speed_sizes=(64,),
        speed_repeats=1,
        sample_sizes=(64,),
        sample_steps=12,
        prompts=("red apple, teal background", "cat face, purple background"),
    ),
)
