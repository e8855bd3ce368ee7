"""Softmax attention: the teacher's mixer, and the quadratic baseline."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mixers.context import TextAttention, TextTokens, join_visible
from mixers.entries import UNBOUNDED_SUMS, register_mixer
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
        "False": UNBOUNDED_SUMS,
    },
)
class Softmax(TokenMixer):
    """Softmax attention (1706.03762): W = exp(q·k/√k), rows normalized; the quadratic baseline."""

    weighs_text: ClassVar[bool] = False

    @classmethod
    def refuses_normalizer(cls, name: str) -> str | None:
        """Softmax is its own normalizer."""
        return "rows of exp(q·k) are divided by their sums, without which they overflow"

    def mix(self, streams: Streams) -> Tensor:
        """Compute softmax(q kᵀ/√k) v with torch's scaled dot product attention, in O(l²) time."""
        if streams.visible is not None:
            return self._attend(streams.q, streams.k, streams.v, streams.visible)
        q, k, v = (t.transpose(1, 2) for t in (streams.q, streams.k, streams.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.config.causality == "causal").transpose(1, 2)

    def mix_with_text(self, streams: Streams, text: TextTokens) -> Tensor:
        """Compute softmax attention over image and text: one denominator, whatever `text` of the configuration is."""
        k = torch.cat([streams.k, text.rotated_k], dim=1)
        v = torch.cat([streams.v, text.v], dim=1)
        return self._attend(streams.q, k, v, join_visible(streams.v, streams.visible, text.v, text.visible))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        """Attend to keys, of which the first l are the image's own and the others seen by all: (b, l, h, v)."""
        mask = None if visible is None else visible[:, None, None]
        if self.config.causality == "causal":
            length = q.shape[1]
            past = torch.ones(length, k.shape[1], dtype=torch.bool, device=q.device)
            past[:, :length] = past[:, :length].tril()
            mask = past if mask is None else past & mask
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def hide_tokens(self, streams: Streams, visible: Tensor) -> Streams:
        """Mark hidden tokens."""
        return replace(streams, visible=visible)

    @property
    def text_attentions(self) -> dict[TextAttention, str | None]:
        """For every value of `text`: None if it is supported, otherwise the reason."""
        return {"softmax": None, "shared": None, "linear": "exp(q·k) is not a product of features"}

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

    def operator_state_size(self, length: int) -> int:
        """Return the numbers in the keys and values of all tokens so far."""
        return length * (self.key_width + self.value_width)

    def operator_flops(self, length: int) -> int:
        """Return the operations of two l × l products per head."""
        return 2 * length**2 * (self.key_width + self.value_width)
