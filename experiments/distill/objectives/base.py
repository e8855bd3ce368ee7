"""What an objective is, and what it gets to see of a training step.

Every objective is a mean over the samples of a batch, of a number that depends on one sample alone. A batch in parts
(several processes, micro-batches) therefore has the loss and the gradients of the whole. Errors are computed in float32
at least, whatever the networks' dtype is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mixers.precision import accumulation_dtype
from unet_adapters import MixerAdapter
from unet_adapters.capture import SiteCall

Requirement = Literal["teacher", "student", "sites", "rows"]
"""What an objective reads: a forward pass of the teacher or the student, the calls of their sites, matrix rows."""


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass of the UNet.

    Attributes:
        prediction: (b, c, h, w).
        sites: if an objective needs them, the call of every site by name.
    """

    prediction: Tensor
    sites: dict[str, SiteCall]


class UnavailableForward:
    """Stands for a forward pass that no active objective declared; reading it is a bug of the objective."""

    def __init__(self, requirement: Requirement) -> None:
        self.requirement = requirement

    def __getattr__(self, name: str) -> Any:
        raise ValueError(
            f"An objective reads {self.requirement}.{name} without {self.requirement!r} in `needs`. Add it there."
        )


@dataclass(frozen=True)
class DistillationStep:
    """What objectives see of one training step. The student is mounted.

    Attributes:
        adapter: of the student, in the UNet `adapter.model`.
        target: what a perfect model predicts (b, c, h, w).
        row_shares: (b, r) in [0, 1), which rows of the mixing matrices are compared, as shares of the tokens.
        teacher, student: their forward passes.
        rows: by site, (b, r, h, l) of the teacher's attention matrices.
    """

    adapter: MixerAdapter
    target: Tensor
    row_shares: Tensor
    teacher: Any
    student: Any
    rows: dict[str, Tensor] = field(default_factory=dict)

    def mean_over_sites(self, error: Callable[[str, SiteCall], Tensor]) -> Tensor:
        """Return the mean of `error(name, the teacher's call)` over the sites where a mixer runs at this size.

        The sites share no parameters and no graph, so each site's gradients depend on that site alone. Under gradient
        checkpointing only one site's graph is in memory at a time, for one more forward pass of each.

        Raises:
            ValueError: there is no such site.
        """
        calls = {n: c for n, c in self.teacher.sites.items() if c.tokens >= self.adapter.min_tokens}
        if not calls:
            most = max(call.tokens for call in self.teacher.sites.values())
            raise ValueError(
                f"No mixer runs at this size: the sites see {most} tokens at most, and mixers run from "
                f"min_tokens={self.adapter.min_tokens} on. Train on larger images, or lower min_tokens."
            )
        run = partial(checkpoint, error, use_reentrant=False) if self.adapter.model.is_gradient_checkpointing else error
        return torch.stack([run(name, call) for name, call in calls.items()]).mean()


class Objective:
    """One term of a loss. Subclasses are frozen dataclasses whose fields are the objective's options.

    Attributes:
        needs: `teacher`, `student`: their forward passes; `sites`: in these, the calls of the sites; `rows`: of the
            teacher's attention matrices.
    """

    needs: ClassVar[frozenset[Requirement]] = frozenset()

    def __call__(self, step: DistillationStep) -> Tensor:
        """Return the value of the term, a scalar with a graph to the student's parameters.

        Raises:
            ValueError: there is nothing to compare.
        """
        raise NotImplementedError


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean squared difference, in float32 at least."""
    return (a.to(accumulation_dtype(a)) - b.to(accumulation_dtype(b))).square().mean()
