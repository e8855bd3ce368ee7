"""Softmax attention: the teacher, and the quadratic baseline."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mixers.mixer import MixerConfig, Streams, TokenMixer, upcast
from mixers.registry import register_mixer
from mixers.traits import Traits


@register_mixer(
    "softmax",
    causalities=("causal", "noncausal"),
    normalizations=(True,),
    unsupported={
        "bidirectional": "two passes over an unordered kernel are the non-causal form",
        "False": "exp(q·k) is unbounded, so its sums overflow without the division",
    },
)
class Softmax(TokenMixer):
    """Softmax attention: W = exp(q·k/√k), rows normalized; the quadratic baseline."""

    Config: ClassVar[Any] = MixerConfig
    exceptions: ClassVar[dict[str, str]] = {"check_flops": "torch does not count its fused attention on a CPU"}

    def mix(self, streams: Streams) -> Tensor:
        """softmax(q kᵀ/√k) v by torch's scaled dot product attention; O(l²) time."""
        q, k, v = (t.transpose(1, 2) for t in (streams.q, streams.k, streams.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.config.causality == "causal").transpose(1, 2)

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """(b, h, l, l), from the formula."""
        dtype = upcast(streams.q.dtype)
        scores = torch.einsum("bihk,bjhk->bhij", streams.q.to(dtype), streams.k.to(dtype))
        scores = scores / math.sqrt(self.key_dim)
        if self.config.causality == "causal":
            ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(ahead, -math.inf)
        return scores.softmax(-1)

    @property
    def positive(self) -> bool:
        """Exponentials are."""
        return True

    @property
    def traits(self) -> Traits:
        """What this mixer, as configured, promises."""
        return replace(super().traits, linear=False)

    def state_size(self, length: int) -> int:
        """Keys and values of every token so far."""
        return 2 * length * self.dim

    def operator_flops(self, length: int) -> int:
        """Two l × l products a head."""
        return 4 * length**2 * self.dim
