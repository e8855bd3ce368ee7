"""Which feature map should linear attention have? Signed ones (`identity`) cannot be normalized."""

from experiments.config import Grid, Variant
from experiments.grids.shared import EVALUATION, SEEDS, controls, recommended_distillation
from mixers.feature_maps import FEATURE_MAPS

_MIXERS = {"linear_attention": "linear attention", "linfusion": "LinFusion"}

PLAN = recommended_distillation()

GRID = Grid(
    name="features",
    question="Which feature map should linear attention have: elu + 1, ReLU, none, or the focused one?",
    variants=(
        *controls(PLAN),
        *(
            Variant(
                name=f"{mixer}_{feature_map}{'' if normalize else '_unnormalized'}",
                label=f"{label}, {feature_map}{'' if normalize else ', not normalized'}",
                mixer=mixer,
                normalize=normalize,
                options={"feature_map": feature_map},
            )
            for mixer, label in _MIXERS.items()
            for feature_map, phi in FEATURE_MAPS.items()
            for normalize in (True, False)
            if phi.positive or not normalize
        ),
        *(
            Variant(
                name=f"{mixer}_{feature_map}_mean_scale",
                label=f'{label}, {feature_map}, scale="mean"',
                mixer=mixer,
                normalize=False,
                options={"feature_map": feature_map, "scale": "mean"},
            )
            for mixer, label in _MIXERS.items()
            for feature_map in FEATURE_MAPS
        ),
        *(
            Variant(name=f"focused_{power}", label=f"focused, power {power}", mixer="focused", options={"power": power})
            for power in (1, 3, 5)
        ),
    ),
    seeds=SEEDS,
    reference=f"linear_attention_{next(iter(FEATURE_MAPS))}",
    distillation=PLAN,
    evaluation=EVALUATION,
)
