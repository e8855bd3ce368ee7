"""The mixing matrix and receptive field of one site of a student, as arrays for the report's figures."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.distill.loss import autocast
from experiments.metrics.inputs.student import EvaluatedStudent
from mixers import structure
from unet_adapters.capture import capture_sites
from unet_adapters.layer_projections import LayerProjections

TIMESTEP = 500


@torch.no_grad()
def mixing_arrays(student: EvaluatedStudent, size: int) -> dict[str, Tensor]:
    """Compute how the first site's first head mixes the tokens of one held-out image at timestep 500.

    Args:
        student: not mounted.
        size: side of the image in pixels.

    Returns:
        mixing_matrix: (l, l) among image tokens; of a mixer with a matrix for each value channel, the first channel's.
            Text tokens and rotary embeddings that the host's layer has are left out.
        receptive_field: (2h − 1, 2w − 1) for a site of h × w tokens: the share of |weight| by offset from the query,
            which is in the middle, as a mean over queries; missing if the site has no grid.
        Costs l² memory, a few times.
    """
    context = student.context
    site = student.adapter.sites[0].name
    projections = LayerProjections(context.teacher.denoiser.get_submodule(site))
    images = student.noisy_images(size, size).first(1)
    with student.adapter.mounted(), autocast(context.teacher):
        with capture_sites(context.teacher.denoiser, [site]) as calls:
            for inputs in images.batches(TIMESTEP):
                context.teacher.predict(*inputs)
        call = calls[site]
        mixer = student.adapter.mixers[site]
        image = call.input[:, call.text_tokens or 0 :]
        matrices = structure.mixing_matrix(mixer, image, projections=projections, grid=call.grid)[0, 0]
    matrix = (matrices if matrices.ndim == 2 else matrices[0]).float().cpu()
    arrays = {"mixing_matrix": matrix.contiguous()}
    if call.grid is not None:
        arrays["receptive_field"] = sum_by_offset(matrix, call.grid)
    return arrays


def sum_by_offset(matrix: Tensor, grid: tuple[int, int]) -> Tensor:
    """Sum |W_ij| / Σ_j |W_ij| by the offset from i to j and average over i: (l, l) -> (2h − 1, 2w − 1).

    Tokens are in raster order; offset (0, 0) is in the middle. The shares sum to 1 if no row is all zeros.
    """
    height, width = grid
    shares = structure.receptive_field(matrix, grid)
    total = matrix.new_zeros(2 * height - 1, 2 * width - 1)
    for query, field in enumerate(shares):
        top = height - 1 - query // width
        left = width - 1 - query % width
        total[top : top + height, left : left + width] += field
    return total / len(matrix)
