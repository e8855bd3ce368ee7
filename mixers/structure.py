"""Look at a mixer as the matrix it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixers.mixer import TokenMixer, with_values
from mixers.stages.directions import inverse


def mixing_matrix(mixer: TokenMixer, x: Tensor, projections: Any = None, grid: tuple[int, int] | None = None) -> Tensor:
    """The l × l matrix that `mixer` applies to the values of tokens x (b, l, d): (b, h, l, l), float32 at least.

    (b, h, v, l, l) where every value channel has its own. From the mixer's formula, normalised if the mixer is;
    rows and columns are in raster order whatever the scan. Costs O(b·h·l²) memory.
    `projections` and `grid`: as in the mixer's forward.
    """
    host, total, orders = mixer.host(projections), None, mixer.orders(x, grid)
    for order in orders:
        weights = mixer.weights(mixer.streams(x if order is None else x[:, order], host, grid))
        if order is not None:
            back = inverse(order)
            weights = weights[..., back, :][..., back]
        total = weights if total is None else total + weights
    assert total is not None  # there is always an order
    return total / len(orders)


def probed_matrix(mixer: TokenMixer, x: Tensor, projections: Any = None, grid: tuple[int, int] | None = None) -> Tensor:
    """The same matrix as `mixing_matrix`, found by mixing basis values: whatever the mixer does, it shows.

    Values e_j, one token of one item at a time, in every channel: l passes over the batch, so small inputs only.
    Shape (b, h, v, l, l): every value channel is probed.
    """
    host, total, orders = mixer.host(projections), None, mixer.orders(x, grid)
    for order in orders:
        streams = mixer.streams(x if order is None else x[:, order], host, grid)
        columns = []
        for j in range(x.shape[1]):
            basis = torch.zeros_like(streams.v)
            basis[:, j] = 1
            columns.append(mixer.mix(with_values(streams, basis)))
        weights = torch.stack(columns, dim=-1).permute(0, 2, 3, 1, 4)  # (b, i, h, v, j) -> (b, h, v, i, j)
        if order is not None:
            back = inverse(order)
            weights = weights[..., back, :][..., back]
        total = weights if total is None else total + weights
    assert total is not None  # there is always an order
    return total / len(orders)


def row_sums(matrix: Tensor) -> Tensor:
    """(…, l, l) -> (…, l); ones for a normalised mixer, up to its eps."""
    return matrix.sum(-1)


def is_causal(matrix: Tensor) -> bool:
    """Whether no token is mixed from a later one."""
    return not bool(matrix.triu(1).any())


def numerical_rank(matrix: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Singular values above `tolerance` times the largest, (…): at most k for linear attention without a mask."""
    values = torch.linalg.svdvals(matrix.double())
    return (values > tolerance * values[..., :1]).sum(-1)
