"""The path from Mamba-2 to LinFusion (2409.02097 §3), one change a row."""

from experiments.config import Grid, Variant
from experiments.grids import EVALUATION, PAPER, SEEDS, SOFTMAX, ours

GRID = Grid(
    name="design",
    question="From a bidirectional Mamba-2 to LinFusion: what does each change of the design bring?",
    variants=(
        SOFTMAX,
        Variant(
            name="mamba2_block",
            label="0 bidirectional Mamba-2 with its convolution and skip",
            mixer="mamba2",
            causality="bidirectional",
            normalize=False,
            options={"gate": True, "norm": True, "skip": True, "conv_size": 4},
        ),
        Variant(
            name="mamba2",
            label="1 bidirectional Mamba-2: gating, RMSNorm",
            mixer="mamba2",
            causality="bidirectional",
            normalize=False,
            options={"gate": True, "norm": True},
        ),
        Variant(
            name="no_gate",
            label="2 without gating and RMSNorm",
            mixer="mamba2",
            causality="bidirectional",
            normalize=False,
        ),
        Variant(name="normalized", label="3 normalized", mixer="mamba2", causality="bidirectional", normalize=True),
        Variant(name="noncausal", label="4 non-causal", mixer="mamba2", causality="noncausal", normalize=True),
        Variant(
            name="linfusion",
            label="5 generalized low-rank linear attention: LinFusion",
            mixer="linfusion",
            causality="noncausal",
            normalize=True,
        ),
        Variant(
            name="linear_attention",
            label="linear attention, without LinFusion's learned maps",
            mixer="linear_attention",
            causality="noncausal",
            normalize=True,
        ),
    ),
    seeds=SEEDS,
    reference="linear_attention",
    claims=PAPER,
    distillation=ours(),
    evaluation=EVALUATION,
)
