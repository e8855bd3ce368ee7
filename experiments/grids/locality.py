"""Is it nearness that decays bring? The same mixers without any, with decays of any kind, and with nearness alone.

A decay makes near tokens weigh more; RetNet's depends on nothing else, and a 3 × 3 convolution of the values adds the
neighbors and nothing else. Non-causal forms have no order for a decay to run along: they keep it as a weight of a key.
"""

from experiments.config import Grid, Variant
from experiments.grids import EVALUATION, PAPER, SEEDS, SOFTMAX, ours

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


GRID = Grid(
    name="locality",
    question="Why do mixers with decay gain from an order here: because near tokens weigh more?",
    variants=(
        SOFTMAX,
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
    claims=PAPER[1:2],
    distillation=ours(),
    evaluation=EVALUATION,
)
