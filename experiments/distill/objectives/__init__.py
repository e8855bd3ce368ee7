"""What a student is trained to match: one objective per file, by name.

    noise      the true noise or velocity                             student's forward pass
    output     the teacher's prediction                               both forward passes
    features   the outputs of the teacher's sites                     both forward passes
    local      the same, each site on the teacher's own input         teacher's forward pass, then site by site
    matrix     rows of the teacher's attention matrices, likewise     teacher's forward pass, then site by site

A new objective is one more file here, or in a package or plug-in of your own, with `@register_objective`. It declares
what it needs, so that a training step runs no more than that.
"""

from experiments.core.registries import OBJECTIVES
from experiments.distill.objectives.base import DistillationStep, Objective, Requirement

register_objective = OBJECTIVES.register
list_objectives = OBJECTIVES.names
create_objective = OBJECTIVES.create

__all__ = [
    "DistillationStep",
    "Objective",
    "Requirement",
    "create_objective",
    "list_objectives",
    "register_objective",
]
