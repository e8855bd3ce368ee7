"""What a causal pass carries from one part of a stream to the next."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LinearState:
    """S = Σ_j k_j v_jᵀ over the tokens so far.

    Attributes:
        memory: (b, h, k, v), float32 at least; v has one more column (the ones) where normalised.
        tokens: how many tokens were summed.
    """

    memory: Tensor
    tokens: int
