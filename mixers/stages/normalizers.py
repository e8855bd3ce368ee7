"""Normalizers: how the rows of a mixing matrix are bounded, from the weights of a mixer before any normalization.

    row_sum      W_ij = S_ij / Σ_t S_it                            rows sum to one; S ≥ 0
    subtract     W_ij = c S_ij + (1 − Σ_t c S_it) / n_i            rows sum to one; any S (InLine, 2412.06590)
    decoupled    W_ij = S_ij / (Σ_t P_it + eps)                    any S; P ≥ 0 (SANA-Video 2.0, 2607.21553)

S are the weights with the mixer's own feature map, P the same weights with relu and without rotary embeddings, c a
constant of the mixer, and n_i the number of tokens that token i sees. S and P are means over these tokens, except where
decay with an order bounds their sums. `row_sum` is computed by the operators.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from mixers.normalization import count_unmasked_tokens
from mixers.streams import Streams
from mixers.traits import Causality

NormalizerName = Literal["row_sum", "subtract", "decoupled"]
NORMALIZER_NAMES: tuple[NormalizerName, ...] = get_args(NormalizerName)


class WeightedMixer(Protocol):
    """What a normalizer needs of a mixer; `mixers.normalized_mixer.NormalizedMixer` describes the methods."""

    @property
    def causality(self) -> Causality:
        """Which tokens each token sees."""

    @property
    def eps(self) -> float:
        """Added to the denominator."""

    @property
    def score_scale(self) -> float:
        """c, the factor of weights from which their mean is subtracted."""

    def apply_unnormalized(self, streams: Streams, v: Tensor, positive: bool = False) -> Tensor:
        """Return S v or P v."""

    def apply_with_row_sums(self, streams: Streams, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return S v and the row sums of S."""

    def row_sums(self, streams: Streams, positive: bool) -> Tensor:
        """Return the row sums of S or P."""

    def unnormalized_matrix(self, streams: Streams, positive: bool = False) -> Tensor:
        """Return S or P."""


class Normalizer(ABC):
    """Mixes values with normalized weights, and computes these weights as a matrix."""

    @abstractmethod
    def mix(self, mixer: WeightedMixer, streams: Streams) -> Tensor:
        """Compute W v, (b, l, h, v), in float32 at least."""

    @abstractmethod
    def matrix(self, mixer: WeightedMixer, streams: Streams) -> Tensor:
        """Compute W, (b, h, l, l) or (b, h, v, l, l), from its formula."""


class Subtraction(Normalizer):
    """W_ij = c S_ij + (1 − Σ_t c S_it) / n_i: the mean score is subtracted, 1/n_i is added."""

    def mix(self, mixer: WeightedMixer, streams: Streams) -> Tensor:
        """Compute W v = c S v + (1 − c S 1) · mean of the visible values."""
        v = streams.values
        mixed, sums = mixer.apply_with_row_sums(streams, v)
        scale = mixer.score_scale
        return scale * mixed + (1 - scale * sums) * _visible_mean(v, mixer.causality, streams.visible)

    def matrix(self, mixer: WeightedMixer, streams: Streams) -> Tensor:
        """Compute W from its formula."""
        scores = mixer.score_scale * mixer.unnormalized_matrix(streams)
        visible = torch.ones_like(scores)
        visible = visible if streams.visible is None else visible * streams.visible[:, None, None]
        visible = visible.tril() if mixer.causality == "causal" else visible
        counts = visible.sum(-1, keepdim=True).clamp_min(1)
        return scores + visible * (1 - scores.sum(-1, keepdim=True)) / counts


class Decoupling(Normalizer):
    """W_ij = S_ij / (Σ_t P_it + eps): signed weights over the row sums of positive ones."""

    def mix(self, mixer: WeightedMixer, streams: Streams) -> Tensor:
        """Compute W v = S v / (P 1 + eps)."""
        return mixer.apply_unnormalized(streams, streams.values) / (mixer.row_sums(streams, positive=True) + mixer.eps)

    def matrix(self, mixer: WeightedMixer, streams: Streams) -> Tensor:
        """Compute W from its formula."""
        sums = mixer.unnormalized_matrix(streams, positive=True).sum(-1, keepdim=True)
        return mixer.unnormalized_matrix(streams) / (sums + mixer.eps)


NORMALIZERS: Mapping[str, Normalizer] = {"subtract": Subtraction(), "decoupled": Decoupling()}
"""The normalizers that combine unnormalized weights; those of `row_sum` are computed by the operators."""


def _visible_mean(v: Tensor, causality: Causality, visible: Tensor | None) -> Tensor:
    """Average the values that each token sees: (b, l, h, v), or (b, 1, h, v) if all tokens see the same; 0 of none."""
    if visible is not None:
        v = v.masked_fill(~visible[..., None, None], 0)
    elif causality != "causal":
        return v.mean(1, keepdim=True)
    sums = v.cumsum(1) if causality == "causal" else v.sum(1, keepdim=True)
    return sums / count_unmasked_tokens(v, causality, visible).clamp_min(1)
