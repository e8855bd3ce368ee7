"""No mixing: the control that shows how much of a result the rest of the network explains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from mixers.constant_mixer import ConstantMixer
from mixers.entries import register_mixer
from mixers.streams import Streams


@register_mixer(
    "identity",
    causalities=("noncausal",),
    normalizations=(True,),
    unsupported={
        "causal": "a token sees only itself, so every causality is the same",
        "bidirectional": "a token sees only itself, so every causality is the same",
        "False": "rows of the identity sum to one in any case",
    },
)
class Identity(ConstantMixer):
    """No mixing, a control: W = I, so Y = V; with local_conv_size=3 the control is a 3 × 3 depthwise convolution."""

    exceptions: ClassVar[Mapping[str, str]] = {"check_sees_every_token": "a token sees only itself"}

    def mix(self, streams: Streams) -> Tensor:
        """Return a copy of the values, (b, l, h, v)."""
        return streams.v.clone()

    def hide_tokens(self, streams: Streams, visible: Tensor) -> Streams:
        """Mark hidden tokens, which no other token sees in any case."""
        return replace(streams, visible=visible)

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """Return the identity, (b, h, l, l)."""
        batch, length, heads, _ = streams.v.shape
        identity = torch.eye(length, device=streams.v.device, dtype=streams.values.dtype)
        return identity.expand(batch, heads, -1, -1)

    def operator_state_size(self, length: int) -> int:
        """Return 0."""
        return 0
