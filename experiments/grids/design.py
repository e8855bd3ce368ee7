"""The path from Mamba-2 to LinFusion (2409.02097 §3), one change in each row.

Two more rows compare LinFusion with linear attention at equal parameters: LinFusion with narrow MLPs, and linear
attention with a gate and a norm, which the path drops.
"""

from experiments.config import Grid, PlannedComparison, Variant
from experiments.grids.shared import EVALUATION, PAPER_CLAIMS, SEEDS, controls, recommended_distillation

PLAN = recommended_distillation()

GRID = Grid(
    name="design",
    question="From a bidirectional Mamba-2 to LinFusion: what does each change of the design contribute?",
    variants=(
        *controls(PLAN),
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
        Variant(
            name="positive_features",
            label="3 elu + 1 as the feature map, which normalization needs",
            mixer="mamba2",
            causality="bidirectional",
            normalize=False,
            options={"feature_map": "elu_plus_one"},
        ),
        Variant(
            name="mean_scale",
            label='3½ scale="mean": bounded sums',
            mixer="mamba2",
            causality="bidirectional",
            normalize=False,
            options={"feature_map": "elu_plus_one", "scale": "mean"},
        ),
        Variant(name="normalized", label="4 normalized", mixer="mamba2", causality="bidirectional", normalize=True),
        Variant(name="noncausal", label="5 non-causal", mixer="mamba2", causality="noncausal", normalize=True),
        Variant(
            name="linfusion",
            label="6 generalized low-rank linear attention: LinFusion",
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
        Variant(
            name="linfusion_narrow",
            label="LinFusion with MLPs of width 20",
            mixer="linfusion",
            causality="noncausal",
            normalize=True,
            options={"mid_dim": 20},
        ),
        Variant(
            name="linear_attention_gated",
            label="linear attention with gating and RMSNorm",
            mixer="linear_attention",
            causality="noncausal",
            normalize=True,
            options={"gate": True, "norm": True},
        ),
    ),
    seeds=SEEDS,
    reference="linear_attention",
    claims=PAPER_CLAIMS,
    comparisons=(
        PlannedComparison(name="equal parameters", above="linfusion_narrow", below="linear_attention_gated"),
        PlannedComparison(name="one design change", above="mamba2", below="mamba2_block"),
        PlannedComparison(name="one design change", above="no_gate", below="mamba2"),
        PlannedComparison(name="one design change", above="positive_features", below="no_gate"),
        PlannedComparison(name="one design change", above="linfusion", below="noncausal"),
    ),
    distillation=PLAN,
    evaluation=EVALUATION,
)
