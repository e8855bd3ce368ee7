"""Does a student keep a ControlNet and an IP-Adapter that never saw it? The student of `mixlab compatibility`.

Its study has controls of its own, so that this grid has one row.
"""

from experiments.config import DistillationConfig, FitConfig, Grid, Variant

GRID = Grid(
    name="compatibility",
    question="Does a ControlNet or an IP-Adapter trained against softmax attention work under a distilled mixer?",
    variants=(Variant(name="linfusion", label="LinFusion", mixer="linfusion"),),
    distillation=DistillationConfig(
        fit=FitConfig(steps=300, batch_size=16, learning_rate=1e-3, warmup=20, checkpoint_every=50),
        images=4096,
        calibrate_outputs=True,
    ),
)
