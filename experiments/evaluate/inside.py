"""A look inside a student: the mixing matrix of one site, and how far it reaches."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.config import EvaluationConfig
from experiments.distill.context import DistillationContext
from experiments.distill.loss import autocast
from experiments.evaluate.fidelity import teacher_views
from mixers import structure
from unet_adapters import MixerAdapter
from unet_adapters.capture import capture_sites


@torch.no_grad()
def look_inside(setting: DistillationContext, adapter: MixerAdapter, size: int) -> dict[str, Tensor]:
    """How the first site's first head mixes tokens, at timestep 500 of one held-out picture of `size` px.

    mixing_matrix: weights (l, l). receptive_field (2h − 1, 2w − 1), of a site of h × w tokens: the share of weight by
    offset from the query, which is in the middle; the mean over queries. Costs l² memory, a few times.
    """
    view = teacher_views(setting, size, size, EvaluationConfig(sizes=(size,), shapes=(), images=1, timesteps=(500,)))[0]
    site = adapter.sites[0].name
    attention = setting.pipe.unet.get_submodule(site)
    with adapter.mounted(), autocast(setting.teacher):
        with capture_sites(setting.pipe.unet, [site]) as calls:
            setting.teacher.predict(view.noisy, view.steps, view.batch)
        call = calls[site]
        weights = structure.mixing_matrix(adapter.mixers[site], call.input, projections=attention, grid=call.grid)[0, 0]
    matrix = (weights if weights.ndim == 2 else weights[0]).float().cpu()  # every value channel its own: the first
    found = {"mixing_matrix": matrix.contiguous()}
    return found if call.grid is None else {**found, "receptive_field": by_offset(matrix, call.grid)}


def by_offset(matrix: Tensor, grid: tuple[int, int]) -> Tensor:
    """|W_ij| over its row's sum, summed by the offset from i to j and averaged over i: (l, l) -> (2h − 1, 2w − 1).

    Tokens are in raster order; offset (0, 0) is in the middle. The shares sum to 1 where no row is all zeros.
    """
    height, width = grid
    shares = structure.receptive_field(matrix, grid)
    total = matrix.new_zeros(2 * height - 1, 2 * width - 1)
    for query, seen in enumerate(shares):
        top, left = height - 1 - query // width, width - 1 - query % width
        total[top : top + height, left : left + width] += seen
    return total / len(matrix)
