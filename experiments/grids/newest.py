"""What has appeared since 2024, on one teacher: exact softmax on a part of the keys, fast weights, weighted keys.

Mixers are in their drop-in forms, which start from the teacher's projections. Those with exact softmax see equally many
keys exactly: three blocks of 8 tokens, or the 25 tokens of a window of radius 3. LinFusion and Mamba-2 are the rows to
compare with. Mixers with an order are bidirectional and normalized: the published blocks have a norm behind them, which
the drop-in form leaves out.
"""

from typing import Any

from experiments.config import Grid, Variant
from experiments.grids.shared import EVALUATION, SEEDS, controls, recommended_distillation

PLAN = recommended_distillation()

_BLOCKS: dict[str, Any] = {"block_size": 8, "kept_blocks": 3}


def _row(name: str, label: str, mixer: str, **options: Any) -> Variant:
    return Variant(name=name, label=label, mixer=mixer, options=options)


def _bidirectional(mixer: str, label: str) -> Variant:
    return Variant(
        name=mixer, label=f"{label}, bidirectional, normalized", mixer=mixer, causality="bidirectional", normalize=True
    )


GRID = Grid(
    name="newest",
    question="Do the newest mixers replace softmax attention better than LinFusion and Mamba-2?",
    variants=(
        *controls(PLAN),
        _row("linfusion", "LinFusion", "linfusion"),
        _bidirectional("mamba2", "Mamba-2"),
        _row("rala", "RALA", "rala"),
        _row("rala_convolution", "RALA, with its convolution", "rala", local_conv_size=None),
        _row("polaformer", "PolaFormer", "polaformer"),
        _row("polaformer_convolution", "PolaFormer, with its convolution", "polaformer", local_conv_size=None),
        _bidirectional("kda", "Kimi Delta Attention"),
        _bidirectional("mamba3", "Mamba-3"),
        _row("sparse_linear", "SLA: 3 blocks of 8, linear attention to the rest", "sparse_linear", **_BLOCKS),
        _row("sparse_linear_hilbert", "SLA, blocks along a Hilbert curve", "sparse_linear", scan="hilbert", **_BLOCKS),
        _row("sparse_linear_shared", "SLA, one denominator", "sparse_linear", combine="shared", **_BLOCKS),
        _row("softmax_window", "softmax in a window of radius 3", "softmax_window", radius=3),
        _row("ttt_linear", "TTT, linear inner model", "ttt", inner="linear"),
        _row("ttt_swiglu", "TTT, SwiGLU inner model (ViT³)", "ttt", inner="swiglu"),
        _row("ttt_mlp", "TTT, MLP inner model (T⁵)", "ttt", inner="mlp"),
    ),
    seeds=SEEDS,
    reference="linfusion",
    distillation=PLAN,
    evaluation=EVALUATION,
)
