"""Mixers as matrices: the matrix of a mixer, from its formula or by probing, and the properties of such a matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mixers.image_grid import ImageGrid
from mixers.mixer import TokenMixer
from mixers.stages.projections import ProjectionLayers
from mixers.stages.scan_orders import inverse_permutation
from mixers.streams import Streams, with_values


def mixing_matrix(
    mixer: TokenMixer, x: Tensor, projections: ProjectionLayers | None = None, grid: ImageGrid | None = None
) -> Tensor:
    """Compute from its formula the matrix that a mixer applies to the values of tokens x.

    Costs O(b·h·l²) memory.

    Args:
        mixer: any mixer.
        x: tokens (b, l, d).
        projections, grid: as in the mixer's forward.

    Returns:
        (b, h, l, l), or (b, h, v, l, l) if every value channel has its own matrix; float32 at least. Rows are
        normalized if the mixer is. Rows and columns are in raster order, whatever the scan. Of a mixer that is not
        linear in its values, the derivative within every value channel (`traits.linear_in_values`).
    """
    return _mean_over_orders(mixer, x, projections, grid, mixer.mixing_matrix)


def probed_matrix(
    mixer: TokenMixer, x: Tensor, projections: ProjectionLayers | None = None, grid: ImageGrid | None = None
) -> Tensor:
    """Measure the matrix of a mixer by mixing basis values, independently of its formula.

    Mixes the values e_j for one token j at a time: l mixings, so for small inputs only. The mixer has to be linear in
    its values.

    Args:
        mixer, x, projections, grid: as in `mixing_matrix`.

    Returns:
        (b, h, v, l, l).
    """

    def probe(streams: Streams) -> Tensor:
        columns = []
        for j in range(streams.v.shape[1]):
            basis = torch.zeros_like(streams.v)
            basis[:, j] = 1
            columns.append(mixer.mix(with_values(streams, basis)))
        return torch.stack(columns, dim=-1).permute(0, 2, 3, 1, 4)  # (b, i, h, v, j) -> (b, h, v, i, j)

    return _mean_over_orders(mixer, x, projections, grid, probe)


def _mean_over_orders(
    mixer: TokenMixer,
    x: Tensor,
    projections: ProjectionLayers | None,
    grid: ImageGrid | None,
    compute_matrix: Callable[[Streams], Tensor],
) -> Tensor:
    """Average a matrix over the orders of the mixer's scan, with rows and columns back in raster order."""
    projections = mixer.resolve_projections(projections)
    matrices = []
    for order in mixer.scan_orders(x, grid):
        streams = mixer.compute_streams(x if order is None else x[:, order], projections, grid)
        matrix = compute_matrix(streams)
        if order is not None:
            raster = inverse_permutation(order)
            matrix = matrix[..., raster, :][..., raster]
        matrices.append(matrix)
    return sum(matrices[1:], matrices[0]) / len(matrices)


def row_sums(matrix: Tensor) -> Tensor:
    """Sum the rows of a matrix, (…, l, l) -> (…, l); ones for a normalized mixer, up to its eps."""
    return matrix.sum(-1)


class Triangularity(NamedTuple):
    """Shares of Σ|W_ij|, (…) each, which add up to one.

    Attributes:
        past: j < i, from earlier tokens.
        own: j = i, on the diagonal.
        future: j > i, from later tokens; 0 for a causal mixer.
    """

    past: Tensor
    own: Tensor
    future: Tensor


def triangularity(matrix: Tensor) -> Triangularity:
    """Return the shares of a matrix (…, l, l) before, on and after the diagonal; NaN for a matrix of zeros."""
    magnitude = matrix.abs()
    total = magnitude.sum((-2, -1))
    own = magnitude.diagonal(dim1=-2, dim2=-1).sum(-1)
    future = magnitude.triu(1).sum((-2, -1))
    return Triangularity((total - own - future) / total, own / total, future / total)


def is_causal(matrix: Tensor) -> bool:
    """Return whether every entry above the diagonal is zero."""
    return not bool(matrix.triu(1).any())


def numerical_rank(matrix: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Count the singular values above `tolerance` times the largest, (…); at most k for unmasked linear attention."""
    values = torch.linalg.svdvals(matrix.double())
    return (values > tolerance * values[..., :1]).sum(-1)


def semiseparable_rank(matrix: Tensor, tolerance: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Compute the largest numerical rank of the blocks below the diagonal, and of those above it.

    The blocks are W[i:, :i] and W[:i, i:] for every split i: everything that the tokens on one side receive from the
    other. The rank is at most the state size n of an SSD mixer (2405.21060, definition 3.1), and on both sides for a
    quasiseparable one (2407.09941). Costs O(l⁴) time, so for small inputs only.

    Args:
        matrix: (…, l, l).
        tolerance: singular values count above `tolerance` times the largest of the whole matrix.

    Returns:
        The ranks below and above the diagonal, (…) each.
    """
    matrix = matrix.double()
    threshold = tolerance * torch.linalg.matrix_norm(matrix, ord=2)
    zero = torch.zeros(matrix.shape[:-2], dtype=torch.int64, device=matrix.device)
    lower = [zero]
    upper = [zero]
    for i in range(1, matrix.shape[-1]):
        for ranks, block in ((lower, matrix[..., i:, :i]), (upper, matrix[..., :i, i:])):
            ranks.append((torch.linalg.svdvals(block) > threshold[..., None]).sum(-1))
    return torch.stack(lower).amax(0), torch.stack(upper).amax(0)


def receptive_field(matrix: Tensor, grid: ImageGrid) -> Tensor:
    """Return the row of each token as an image: |W_ij| over the sum of its row, (…, l, l) -> (…, l, height, width).

    Rows of zeros stay zeros. Tokens are in raster order; height · width = l.
    """
    magnitude = matrix.abs()
    total = magnitude.sum(-1, keepdim=True).clamp_min(torch.finfo(magnitude.dtype).tiny)
    return (magnitude / total).unflatten(-1, grid)


def effective_radius(matrix: Tensor, grid: ImageGrid) -> Tensor:
    """Compute how far each token sees: the root mean squared distance weighted by |W_ij|, (…, l), in grid positions.

    0 for the identity and for rows of zeros. Uniform mixing over h × w positions gives the token at (y, x)
    √((h² + w² − 2)/12 + (y − (h − 1)/2)² + (x − (w − 1)/2)²). Costs O(l²) memory per matrix.

    Args:
        matrix: (…, l, l), in raster order.
        grid: (height, width) with height · width = l.
    """
    height, width = grid
    index = torch.arange(height * width, device=matrix.device)
    positions = torch.stack([index // width, index % width], dim=-1).to(matrix.dtype)
    squared = (positions[:, None] - positions).square().sum(-1)
    return (receptive_field(matrix, grid).flatten(-2) * squared).sum(-1).sqrt()
