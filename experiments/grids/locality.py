"""Do decays help because they favor near tokens? Mixers with no decay, with a fixed and with a learned one.

A decay gives near tokens more weight; RetNet's depends on nothing else, and a 3 × 3 convolution of the values adds the
neighbors and nothing else. Non-causal forms have no order for a decay to act along, so it becomes a weight of each key.
"""

from experiments.config import Grid, Variant
from experiments.grids.shared import EVALUATION, NONCAUSAL_IS_BETTER, SEEDS, controls, recommended_distillation

_MIXERS = {"linear_attention": "no decay", "retnet": "fixed decay", "mamba2": "learned decay"}


def _row(mixer: str, causality: str, convolution: int = 0) -> Variant:
    convolved = f", {convolution} × {convolution} convolution" if convolution else ""
    return Variant(
        name=f"{mixer}_{causality}" + ("_convolution" if convolution else ""),
        label=f"{_MIXERS[mixer]}, {causality.replace('noncausal', 'non-causal')}{convolved}",
        mixer=mixer,
        causality=causality,
        normalize=True,
        options={"local_conv_size": convolution} if convolution else {},
    )


PLAN = recommended_distillation()

GRID = Grid(
    name="locality",
    question="Why do mixers with decay gain from an order: because near tokens get more weight?",
    variants=(
        *controls(PLAN),
        _row("linear_attention", "noncausal"),
        _row("linear_attention", "noncausal", convolution=3),
        _row("linear_attention", "causal"),
        _row("retnet", "causal"),
        _row("retnet", "bidirectional"),
        _row("mamba2", "noncausal"),
        _row("mamba2", "causal"),
        _row("mamba2", "bidirectional"),
    ),
    seeds=SEEDS,
    reference="linear_attention_noncausal",
    claims=(NONCAUSAL_IS_BETTER,),
    distillation=PLAN,
    evaluation=EVALUATION,
)
