"""Mixers whose rows can be normalized in several ways: linear attention, the selective scan and the delta rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from mixers.mixer import TokenMixer
from mixers.normalization import append_ones
from mixers.stages.normalizers import NORMALIZERS
from mixers.streams import Streams
from mixers.traits import Causality


class NormalizedMixer(TokenMixer):
    """A mixer that provides its weights before any normalization; `stages.normalizers` has the formulas.

    Unnormalized, or with `normalizer="row_sum"`, the operator computes everything: `mix_directly`, `direct_matrix`.

    Class attributes that a subclass sets:
        refused_normalizers: {normalizer: reason} of those that have no meaning for it.
    """

    refused_normalizers: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def refuses_normalizer(cls, name: str) -> str | None:
        """Return why the mixer cannot be normalized that way, or None if it can."""
        if cls.mix is not NormalizedMixer.mix:
            return super().refuses_normalizer(name)
        return cls.refused_normalizers.get(name)

    def mix(self, streams: Streams) -> Tensor:
        """Compute W v, (b, l, h, v)."""
        normalizer = NORMALIZERS.get(self.config.row_normalizer or "")
        return self.mix_directly(streams) if normalizer is None else normalizer.mix(self, streams)

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """Compute W, (b, h, l, l) or (b, h, v, l, l), from its formula."""
        normalizer = NORMALIZERS.get(self.config.row_normalizer or "")
        return self.direct_matrix(streams) if normalizer is None else normalizer.matrix(self, streams)

    def mix_directly(self, streams: Streams) -> Tensor:
        """Compute W v, (b, l, h, v), unnormalized and scaled, or divided by row sums."""
        raise NotImplementedError

    def direct_matrix(self, streams: Streams) -> Tensor:
        """Compute W, (b, h, l, l) or (b, h, v, l, l), unnormalized and scaled, or divided by row sums."""
        raise NotImplementedError

    def apply_unnormalized(self, streams: Streams, v: Tensor, positive: bool = False) -> Tensor:
        """Apply the weights before any normalization to values v (b, l, h, ·): (b, l, h, ·).

        They are means over the visible tokens, except where decay with an order bounds their sums.

        Args:
            streams: of the tokens.
            v: the values, float32 at least.
            positive: use relu, without rotary embeddings, instead of the mixer's own features. Only the delta
                rule then still has negative weights.
        """
        raise NotImplementedError

    def unnormalized_matrix(self, streams: Streams, positive: bool = False) -> Tensor:
        """Compute the matrix that `apply_unnormalized` applies, (b, h, l, l) or (b, h, v, l, l), from its formula."""
        raise NotImplementedError

    def apply_with_row_sums(self, streams: Streams, v: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the weights to v, and compute their row sums (b, l, h, 1), in one pass."""
        mixed = self.apply_unnormalized(streams, append_ones(v))
        return mixed[..., :-1], mixed[..., -1:]

    def row_sums(self, streams: Streams, positive: bool) -> Tensor:
        """Compute the row sums of the weights, (b, l, h, 1)."""
        v = streams.values
        return self.apply_unnormalized(streams, v.new_ones(*v.shape[:3], 1), positive)

    @property
    def score_scale(self) -> float:
        """The factor of weights from which their mean is subtracted."""
        raise NotImplementedError

    @property
    def eps(self) -> float:
        """Added to denominators."""
        raise NotImplementedError

    @property
    def causality(self) -> Causality:
        """Which tokens each token sees."""
        return self.config.causality

    @property
    def divides_by_row_sums(self) -> bool:
        """Whether rows are divided by their sums, which needs positive weights."""
        return self.config.row_normalizer == "row_sum"

    @property
    def value_widths(self) -> tuple[int, ...]:
        """Value channels per head of each pass through the operator, with row sums as one more channel."""
        if self.config.row_normalizer == "decoupled":
            return self.head_dim, 1
        return (self.head_dim + int(self.config.normalize),)

    @property
    def value_sum_size(self) -> int:
        """Numbers in the sum of the values, which a causal mean carries on."""
        return self.value_width if self.config.row_normalizer == "subtract" else 0
