"""Softmax attention: the teacher, and the quadratic baseline."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mixers.mixer import MixerConfig, TokenMixer, upcast
from mixers.registry import register_mixer
from mixers.traits import Traits


@register_mixer(
    "softmax",
    causalities=("causal", "noncausal"),
    normalizations=(True,),
    refusals={
        "bidirectional": "two passes over an unordered kernel are the non-causal form",
        "False": "exp(q·k) is unbounded, so its sums overflow without the division",
    },
)
class Softmax(TokenMixer):
    """Softmax attention: W = exp(q·k/√k), rows normalised; the quadratic baseline."""

    Config: ClassVar[Any] = MixerConfig

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q kᵀ/√k) v by torch's scaled dot product attention; O(l²) time."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.config.causality == "causal").transpose(1, 2)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """(b, h, l, l), from the formula."""
        dtype = upcast(q.dtype)
        scores = torch.einsum("bihk,bjhk->bhij", q.to(dtype), k.to(dtype)) / math.sqrt(q.shape[-1])
        if self.config.causality == "causal":
            ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(ahead, -math.inf)
        return scores.softmax(-1)

    @property
    def traits(self) -> Traits:
        """What this mixer, as configured, promises."""
        ordered = self.config.causality == "causal"
        return Traits(self.config.causality, normalized=True, positive=True, order_free=not ordered, linear=False)

    def state_size(self, length: int) -> int:
        """Keys and values of every token so far."""
        return 2 * length * self.dim

    def mixing_flops(self, length: int) -> int:
        """Two l × l products a head."""
        return 4 * length**2 * self.dim
