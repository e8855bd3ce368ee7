"""Look at a mixer as the matrix it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixers.mixer import TokenMixer


def mixing_matrix(mixer: TokenMixer, x: Tensor, projections: Any = None) -> Tensor:
    """The l × l matrix that `mixer` applies to the values of tokens x (b, l, d): (b, h, l, l), float32 at least.

    From the mixer's formula, normalised if the mixer is. Costs O(b·h·l²) memory.
    `projections`: the host's, as in the mixer's forward.
    """
    q, k = mixer.queries_keys(x, mixer.host(projections))
    return mixer.weights(q, k)


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
