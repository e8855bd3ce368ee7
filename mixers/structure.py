"""Look at a mixer as the matrix it is: W (…, l, l), from its formula or by probing, and what such a matrix has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixers.mixer import Streams, TokenMixer, with_values
from mixers.stages.scan_orders import inverse_permutation


def mixing_matrix(mixer: TokenMixer, x: Tensor, projections: Any = None, grid: tuple[int, int] | None = None) -> Tensor:
    """The l × l matrix that `mixer` applies to the values of tokens x (b, l, d): (b, h, l, l), float32 at least.

    (b, h, v, l, l) where every value channel has its own. From the mixer's formula, normalized if the mixer is;
    rows and columns are in raster order whatever the scan. Costs O(b·h·l²) memory.
    `projections` and `grid`: as in the mixer's forward.
    """
    return _over_orders(mixer, x, projections, grid, mixer.mixing_matrix)


def probed_matrix(mixer: TokenMixer, x: Tensor, projections: Any = None, grid: tuple[int, int] | None = None) -> Tensor:
    """The same matrix as `mixing_matrix`, found by mixing basis values: whatever the mixer does, it shows.

    Values e_j, one token at a time, in every channel: l mixings, so small inputs only. (b, h, v, l, l).
    """

    def probe(streams: Streams) -> Tensor:
        columns = []
        for j in range(streams.v.shape[1]):
            basis = torch.zeros_like(streams.v)
            basis[:, j] = 1
            columns.append(mixer.mix(with_values(streams, basis)))
        return torch.stack(columns, dim=-1).permute(0, 2, 3, 1, 4)  # (b, i, h, v, j) -> (b, h, v, i, j)

    return _over_orders(mixer, x, projections, grid, probe)


def _over_orders(
    mixer: TokenMixer, x: Tensor, projections: Any, grid: tuple[int, int] | None, look: Callable[[Streams], Tensor]
) -> Tensor:
    """The mean over the orders of the scan of what `look` gives, rows and columns put back in raster order."""
    host, found = mixer.resolve_projections(projections), []
    for order in mixer.scan_orders(x, grid):
        weights = look(mixer.compute_streams(x if order is None else x[:, order], host, grid))
        back = None if order is None else inverse_permutation(order)
        found.append(weights if back is None else weights[..., back, :][..., back])
    return sum(found[1:], found[0]) / len(found)


def row_sums(matrix: Tensor) -> Tensor:
    """(…, l, l) -> (…, l); ones for a normalized mixer, up to its eps."""
    return matrix.sum(-1)


class Triangularity(NamedTuple):
    """Shares of Σ|W_ij|, (…) each; they add up to one.

    Attributes:
        past: j < i, tokens read from earlier ones.
        own: j = i.
        future: j > i; 0 for a causal mixer.
    """

    past: Tensor
    own: Tensor
    future: Tensor


def triangularity(matrix: Tensor) -> Triangularity:
    """Where the weight of a matrix (…, l, l) lies: before, on and after the diagonal. NaN for a matrix of zeros."""
    size = matrix.abs()
    total = size.sum((-2, -1))
    own = size.diagonal(dim1=-2, dim2=-1).sum(-1)
    future = size.triu(1).sum((-2, -1))
    return Triangularity((total - own - future) / total, own / total, future / total)


def is_causal(matrix: Tensor) -> bool:
    """Whether no token is mixed from a later one."""
    return not bool(matrix.triu(1).any())


def numerical_rank(matrix: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Singular values above `tolerance` times the largest, (…): at most k for linear attention without a mask."""
    values = torch.linalg.svdvals(matrix.double())
    return (values > tolerance * values[..., :1]).sum(-1)


def semiseparable_rank(matrix: Tensor, tolerance: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The largest numerical rank of blocks that lie below the diagonal, and above it, (…) each.

    Blocks W[i:, :i] and W[:i, i:] for every split i: all that tokens on one side take from the other. It is at most
    the state size n of an SSD mixer (2405.21060, definition 3.1), in both for a quasiseparable one (2407.09941).
    Singular values count above `tolerance` times the largest of the whole matrix. Costs O(l⁴) time: small inputs only.
    """
    matrix = matrix.double()
    least = tolerance * torch.linalg.matrix_norm(matrix, ord=2)
    none = torch.zeros(matrix.shape[:-2], dtype=torch.int64, device=matrix.device)
    lower, upper = [none], [none]
    for i in range(1, matrix.shape[-1]):
        for ranks, block in ((lower, matrix[..., i:, :i]), (upper, matrix[..., :i, i:])):
            ranks.append((torch.linalg.svdvals(block) > least[..., None]).sum(-1))
    return torch.stack(lower).amax(0), torch.stack(upper).amax(0)


def receptive_field(matrix: Tensor, grid: tuple[int, int]) -> Tensor:
    """What each token sees, as a picture: (…, l, l) -> (…, l, height, width), |W_ij| over the sum of its row.

    Rows that are all zeros stay so. Tokens are in raster order; height · width = l.
    """
    size = matrix.abs()
    return (size / size.sum(-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)).unflatten(-1, grid)


def effective_radius(matrix: Tensor, grid: tuple[int, int]) -> Tensor:
    """How far each token sees: the root mean squared distance, in places of the grid, weighted by |W_ij|: (…, l).

    0 for the identity and for rows of zeros. Uniform weights over h × w places give the token at (y, x)
    √((h² + w² − 2)/12 + (y − (h − 1)/2)² + (x − (w − 1)/2)²). Costs O(l²) memory for each matrix.
    """
    height, width = grid
    rows, columns = torch.arange(height * width, device=matrix.device), torch.arange(width, device=matrix.device)
    places = torch.stack([rows // width, columns.repeat(height)], dim=-1).to(matrix.dtype)
    squared = (places[:, None] - places).square().sum(-1)
    return (receptive_field(matrix, grid).flatten(-2) * squared).sum(-1).sqrt()
