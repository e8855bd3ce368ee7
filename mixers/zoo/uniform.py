"""The mean over tokens: the control that shows what data-dependent mixing adds to averaging."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.constant_mixer import ConstantMixer
from mixers.entries import register_mixer
from mixers.normalization import count_visible_tokens
from mixers.streams import Streams


@register_mixer(
    "uniform",
    normalizations=(True,),
    unsupported={"False": "a mean over tokens is normalized by definition; for a sum, use another mixer"},
)
class Uniform(ConstantMixer):
    """Uniform mixing, a control: W_ij = 1/l, the mean over all tokens; 1/i over the first i if causal."""

    def mix(self, streams: Streams) -> Tensor:
        """Return the mean of the visible values, (b, l, h, v), in float32 at least."""
        v = streams.values
        if self.config.causality == "causal":
            return v.cumsum(1) / count_visible_tokens(v, "causal")[:, None, None]
        return v.mean(1, keepdim=True).repeat(1, v.shape[1], 1, 1)

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """Return the matrix of the mean, (b, h, l, l)."""
        batch, length, heads, _ = streams.v.shape
        matrix = torch.ones(length, length, device=streams.v.device, dtype=streams.values.dtype)
        if self.config.causality == "causal":
            matrix = matrix.tril()
        return (matrix / matrix.sum(-1, keepdim=True)).expand(batch, heads, -1, -1)

    def state_size(self, length: int) -> int:
        """Return the numbers in the sum of the values, h·v."""
        return self.value_width
