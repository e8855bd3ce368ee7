"""What a causal pass carries from one part of a stream to the next."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class State:
    """The memory of the tokens so far.

    Attributes:
        memory: of `linear_attention` and `delta_rule` (b, h, k, v), of `selective_scan` (b, h, v, n); float32 at
            least. Where normalized it holds the column of ones too: v + 1 for the first two, 2·v for the scan.
        tokens: how many tokens there were.
    """

    memory: Tensor
    tokens: int
