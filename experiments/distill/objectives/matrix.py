"""The objective `matrix`, and the teacher's rows that it compares with."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.core.registries import OBJECTIVES
from experiments.distill.objectives.base import DistillationStep, ForwardPass, Objective
from mixers.precision import accumulation_dtype
from mixers.structure import mixing_matrix
from unet_adapters.capture import SiteCall
from unet_adapters.layer_projections import LayerProjections

_log = logging.getLogger(__name__)


@OBJECTIVES.register("matrix")
@dataclass(frozen=True)
class MatrixObjective(Objective):
    """The mean over sites and heads of ‖W − W_T‖² / ‖W_T‖² on sampled rows, for the same input (2408.10189 §3.1).

    W_T is the teacher's softmax matrix, W the student's as it is applied to the values, normalized if the mixer is. The
    distance is the Frobenius norm, not a divergence of distributions, because W may be signed or unnormalized. It is
    relative, so that sites of many tokens (entries of about 1/l) and of few weigh the same. If every value channel has
    a matrix of its own (b, h, v, l, l), each is compared with the head's. Trains what the matrix depends on, but not
    values and outputs.

    Attributes:
        max_tokens: sites with more tokens are skipped, which is logged. A student's matrix costs O(b·h·l²) memory and
            time at every site, times v if every channel has one.
    """

    needs = frozenset({"teacher", "sites", "rows"})
    max_tokens: int = 1024

    def __call__(self, step: DistillationStep) -> Tensor:
        for site in step.adapter.sites:
            if site.text or site.rotary:
                reason = "attends to text too" if site.text else "rotates queries and keys"
                raise ValueError(
                    f"matrix compares plain attention among image tokens, and {site.name} {reason}: select other "
                    "sites, or use the objective local."
                )
        small = {n: c for n, c in step.teacher.sites.items() if c.input.shape[1] <= self.max_tokens}
        skipped = [name for name in step.teacher.sites if name not in small]
        if not small:
            raise ValueError(
                f"matrix has no site to compare: all see more than max_tokens={self.max_tokens} tokens. Raise it (the "
                "memory grows with its square), or train this stage on smaller images."
            )
        if skipped:
            _warn_once(f"matrix skips the sites of more than {self.max_tokens} tokens: {', '.join(skipped)}")
        reduced = dataclasses.replace(step, teacher=ForwardPass(step.teacher.prediction, small))
        return reduced.mean_over_sites(partial(self._distance, step))

    def _distance(self, step: DistillationStep, name: str, call: SiteCall) -> Tensor:
        layer = LayerProjections(step.adapter.model.get_submodule(name))
        target = step.rows[name]
        matrix = mixing_matrix(step.adapter.mixers[name], call.input, layer, call.grid)
        samples, rows = row_indices(step.row_shares, call.input.shape[1])
        student = matrix[samples, ..., rows, :]  # (b, r, h, [v,] l)
        if student.ndim > target.ndim:
            target = target[..., None, :].expand_as(student)
        rest = (1, *range(3, student.ndim))
        return ((student - target).square().sum(rest) / target.square().sum(rest)).mean()


def softmax_rows(attention: nn.Module, x: Tensor, row_shares: Tensor) -> Tensor:
    """Rows softmax(q_i kᵀ/√k) of an attention layer's matrix.

    Args:
        attention: a diffusers attention layer.
        x: its input tokens (b, l, d).
        row_shares: (b, r), as in `DistillationStep`.

    Returns:
        (b, r, h, l), float32 at least. Costs O(b·r·h·l): no other row is computed.
    """
    layer: Any = attention
    projections = LayerProjections(layer)
    samples, rows = row_indices(row_shares, x.shape[1])
    q = projections.to_q(x[samples, rows]).unflatten(-1, (layer.heads, -1))
    k = projections.to_k(x).unflatten(-1, (layer.heads, -1))
    scores = torch.einsum("brhk,blhk->brhl", q.to(accumulation_dtype(q)), k.to(accumulation_dtype(k)))
    return (scores * layer.scale).softmax(-1)


def row_indices(row_shares: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Shares (b, r) in [0, 1) -> indices of the samples (b, 1) and of their rows (b, r), for `length` tokens."""
    rows = (row_shares * length).long().clamp(max=length - 1)  # a product may be rounded up to the length
    return torch.arange(len(row_shares), device=row_shares.device)[:, None], rows


@cache
def _warn_once(text: str) -> None:
    """Log a warning the first time, not at every step."""
    _log.warning(text)
