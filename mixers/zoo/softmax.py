"""Softmax attention: the teacher's mixer, and the quadratic baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mixers.entries import register_mixer
from mixers.mixer import TokenMixer
from mixers.precision import accumulation_dtype
from mixers.streams import Streams
from mixers.traits import Traits


@register_mixer(
    "softmax",
    causalities=("causal", "noncausal"),
    normalizations=(True,),
    unsupported={
        "bidirectional": "a kernel without an order makes two passes the non-causal form",
        "False": "exp(q·k) is unbounded, so its sums overflow without the division",
    },
)
class Softmax(TokenMixer):
    """Softmax attention (1706.03762): W = exp(q·k/√k), rows normalized; the quadratic baseline."""

    exceptions: ClassVar[Mapping[str, str]] = {"check_flops": "torch does not count its fused attention on a CPU"}

    @classmethod
    def refuses_normalizer(cls, name: str) -> str | None:
        """Softmax is its own normalizer."""
        return "rows of exp(q·k) are divided by their sums, without which they overflow"

    def mix(self, streams: Streams) -> Tensor:
        """Compute softmax(q kᵀ/√k) v with torch's scaled dot product attention, in O(l²) time."""
        q, k, v = (t.transpose(1, 2) for t in (streams.q, streams.k, streams.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.config.causality == "causal").transpose(1, 2)

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """Compute W, (b, h, l, l), from its formula."""
        dtype = accumulation_dtype(streams.q)
        scores = torch.einsum("bihk,bjhk->bhij", streams.q.to(dtype), streams.k.to(dtype)) / math.sqrt(self.key_dim)
        if self.config.causality == "causal":
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        return scores.softmax(-1)

    @property
    def positive(self) -> bool:
        """Exponentials are positive."""
        return True

    @property
    def traits(self) -> Traits:
        """The properties of this mixer as configured."""
        return replace(super().traits, linear=False)

    def state_size(self, length: int) -> int:
        """Return the numbers in the keys and values of all tokens so far."""
        return 2 * length * self.dim

    def operator_flops(self, length: int) -> int:
        """Return the operations of two l × l products per head."""
        return 4 * length**2 * self.dim
