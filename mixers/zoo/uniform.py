"""The mean over tokens: the control that shows what data-dependent mixing adds to averaging."""

from __future__ import annotations

from dataclasses import replace

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
        if streams.visible is not None:
            return self._mean_of_visible(v, streams.visible)
        if self.config.causality == "causal":
            return v.cumsum(1) / count_visible_tokens(v, "causal")[:, None, None]
        return v.mean(1, keepdim=True).repeat(1, v.shape[1], 1, 1)

    def _mean_of_visible(self, v: Tensor, visible: Tensor) -> Tensor:
        """Average the values (b, l, h, v) that are visible (b, l), up to each token if causal."""
        weights = visible[..., None, None].to(v.dtype)
        if self.config.causality == "causal":
            return (weights * v).cumsum(1) / weights.cumsum(1).clamp_min(1)
        mean = (weights * v).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp_min(1)
        return mean.repeat(1, v.shape[1], 1, 1)

    def hide_tokens(self, streams: Streams, visible: Tensor) -> Streams:
        """Mark hidden tokens."""
        return replace(streams, visible=visible)

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """Return the matrix of the mean, (b, h, l, l)."""
        batch, length, heads, _ = streams.v.shape
        matrix = torch.ones(length, length, device=streams.v.device, dtype=streams.values.dtype)
        if self.config.causality == "causal":
            matrix = matrix.tril()
        return (matrix / matrix.sum(-1, keepdim=True)).expand(batch, heads, -1, -1)

    def operator_state_size(self, length: int) -> int:
        """Return the numbers in the sum of the values, h·v."""
        return self.value_width
