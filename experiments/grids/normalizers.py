"""How to bound the rows of a mixing matrix: by division, by subtraction, by decoupled sums, or by the number of tokens?

LINA (2601.22630) reports that division scales better than subtraction for generation: the planned comparisons are
subtraction ÷ division, mixer by mixer. `subtract` keeps the feature map of the division, so that nothing else differs;
`signed` rows use the identity instead, as InLine and SANA-Video 2.0 do.
"""

from collections.abc import Iterator

from experiments.config import Grid, PlannedComparison, Variant
from experiments.grids.shared import EVALUATION, SEEDS, controls, recommended_distillation
from mixers.traits import Causality

_MIXERS: dict[str, tuple[str, Causality]] = {
    "linear_attention": ("linear attention", "noncausal"),
    "linfusion": ("LinFusion", "noncausal"),
    "gla": ("GLA, bidirectional", "bidirectional"),
    "gated_deltanet": ("Gated DeltaNet, bidirectional", "bidirectional"),
}

PLAN = recommended_distillation()


def _rows(mixer: str, label: str, causality: Causality) -> Iterator[Variant]:
    """Yield one row per normalizer, and one without."""
    normalizers = {
        "row_sum": ("divided by row sums", {"normalizer": "row_sum"}),
        "subtract": ("mean subtracted", {"normalizer": "subtract", "feature_map": "elu_plus_one"}),
        "subtract_signed": ("mean subtracted, signed", {"normalizer": "subtract", "feature_map": "identity"}),
        "decoupled": ("decoupled, signed", {"normalizer": "decoupled"}),
    }
    for name, (description, options) in normalizers.items():
        yield Variant(
            name=f"{mixer}_{name}",
            label=f"{label}, {description}",
            mixer=mixer,
            causality=causality,
            normalize=True,
            options=options,
        )
    unnormalized = {"mixer": mixer, "causality": causality, "normalize": False}
    positive = {"feature_map": "elu_plus_one"}
    yield Variant(name=f"{mixer}_none", label=f"{label}, not normalized", options=positive, **unnormalized)
    if causality == "noncausal":
        yield Variant(
            name=f"{mixer}_mean_scale",
            label=f'{label}, scale="mean"',
            options={**positive, "scale": "mean"},
            **unnormalized,
        )


GRID = Grid(
    name="normalizers",
    question="Division, subtraction or decoupled sums: which normalizer is best, and for which mixer?",
    variants=(
        *controls(PLAN),
        *(row for mixer, (label, causality) in _MIXERS.items() for row in _rows(mixer, label, causality)),
        Variant(name="inline", label="InLine", mixer="inline"),
        Variant(
            name="sana_video_2",
            label="SANA-Video 2.0: decoupled, rotated numerator, norm",
            mixer="mila",
            options={"normalizer": "decoupled", "norm": True},
        ),
    ),
    seeds=SEEDS[:3],
    reference="linear_attention_row_sum",
    comparisons=tuple(
        PlannedComparison(name=f"subtraction ÷ division, {label}", above=f"{mixer}_subtract", below=f"{mixer}_row_sum")
        for mixer, (label, _) in _MIXERS.items()
    ),
    distillation=PLAN,
    evaluation=EVALUATION,
)
