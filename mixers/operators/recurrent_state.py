"""The state that a causal pass carries from one part of a sequence to the next."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RecurrentState:
    """The state after some tokens, from which a causal pass continues.

    Attributes:
        memory: (b, h, k, v) for `linear_attention` and `delta_rule`, (b, h, v, n) for `selective_scan`; float32 at
            least. A normalized pass also carries the channel of ones: v + 1 channels for linear attention, 2·v for the
            scan.
        tokens: number of tokens so far.
    """

    memory: Tensor
    tokens: int
