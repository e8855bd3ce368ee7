"""The objective `local`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from experiments.core.registries import OBJECTIVES
from experiments.distill.objectives.base import DistillationStep, Objective
from mixers.precision import accumulation_dtype
from unet_adapters.capture import SiteCall, replay


@OBJECTIVES.register("local")
@dataclass(frozen=True)
class LocalObjective(Objective):
    """The mean over sites of ‖f(x_T) − a_T‖² / Var(a_T): each site is fed what the teacher's site was fed.

    This is the share of the teacher's output that a site leaves unexplained: 1 for a constant at the mean, 0 for the
    teacher. The division matters although AdamW ignores the scale of a site's gradient: without it the site with the
    largest outputs would dominate the clipping of the whole gradient and the logged number. Variances are per sample.

    Costs one forward pass of the teacher, and forward and backward of the sites alone: nothing is propagated through
    the UNet.
    """

    needs = frozenset({"teacher", "sites"})

    def __call__(self, step: DistillationStep) -> Tensor:
        def unexplained(name: str, call: SiteCall) -> Tensor:
            target = call.output.to(accumulation_dtype(call.output))
            error = (replay(step.adapter.model, name, call) - target).square().mean((1, 2))
            return (error / target.var((1, 2), correction=0)).mean()

        return step.mean_over_sites(unexplained)
