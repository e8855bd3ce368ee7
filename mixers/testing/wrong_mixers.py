"""Deliberately wrong mixers, each wrong in its forward pass and in its matrix alike, so that the two agree.

They are the suite's own tests: a check that compares a mixer with itself finds nothing here, and each mixer is found by
the check that it is listed with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mixers.config import MixerConfig
from mixers.linear_mixer import LinearConfig, LinearMixer
from mixers.mixer import TokenMixer
from mixers.streams import Streams
from mixers.traits import Traits


class _WrongMixer(LinearMixer):
    """Linear attention with φ = elu + 1."""

    Config: ClassVar[type[MixerConfig]] = LinearConfig
    default_feature_map: ClassVar[str] = "elu_plus_one"


class LeaksThroughKeys(_WrongMixer):
    """Each head's keys contain a part of the next head's."""

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return the queries and the mixed keys."""
        q, k = super().features(streams)
        return q, 0.7 * k + 0.3 * k.roll(1, dims=2)


class LeaksThroughQueries(_WrongMixer):
    """Each head's queries contain a part of the next head's."""

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return the mixed queries and the keys."""
        q, k = super().features(streams)
        return 0.7 * q + 0.3 * q.roll(1, dims=2), k


class LeaksThroughTheBatch(_WrongMixer):
    """Keys are divided by their largest value in the batch."""

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return the queries and the scaled keys."""
        q, k = super().features(streams)
        return q, k / k.amax()


class ReadsThePreviousState(_WrongMixer):
    """Causal, and every token reads the state before it is added: it does not see itself."""

    def mix(self, streams: Streams) -> Tensor:
        """Return the sums over earlier tokens."""
        q, k = self.features(streams)
        own = (q * k).sum(-1, keepdim=True) * streams.values * self.scale
        return super().mix(streams) - own

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """Return the strictly lower triangle."""
        return super().mixing_matrix(streams).tril(-1)


class CountsTheDiagonalTwice(_WrongMixer):
    """Bidirectional, and both passes include the token itself."""

    def mix(self, streams: Streams) -> Tensor:
        """Return the sums, with each token's own contribution once more."""
        q, k = self.features(streams)
        own = (q * k).sum(-1, keepdim=True) * streams.values * self.scale
        return super().mix(streams) + (own if self.config.causality == "bidirectional" else 0)

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """Return the matrix with twice its diagonal."""
        matrix = super().mixing_matrix(streams)
        is_bidirectional = self.config.causality == "bidirectional"
        return matrix + torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1)) * is_bidirectional


class ForgetsAfter128Tokens(_WrongMixer):
    """Keys from the 129th token on are zero."""

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return the queries and the truncated keys."""
        q, k = super().features(streams)
        is_early = torch.arange(k.shape[1], device=k.device) < 128
        return q, k * is_early[:, None, None]


class WeighsByPosition(_WrongMixer):
    """Non-causal, and later tokens weigh more, although it claims to be permutation-equivariant."""

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return the queries and the weighted keys."""
        q, k = super().features(streams)
        return q, k * torch.linspace(1, 2, k.shape[1], dtype=k.dtype, device=k.device)[:, None, None]


class SeesTheNextToken(_WrongMixer):
    """Claims to be causal, and its queries are those of the next token."""

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return the moved queries and the keys."""
        q, k = super().features(streams)
        return q.roll(-1, dims=1), k


class DividesByLength(_WrongMixer):
    """Unnormalized, and divided by the number of tokens."""

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return the divided queries and the keys."""
        q, k = super().features(streams)
        return q / q.shape[1], k


class SumsToTwo(_WrongMixer):
    """Claims to be normalized, and its rows sum to two."""

    def mix(self, streams: Streams) -> Tensor:
        """Return twice the result."""
        return 2 * super().mix(streams)

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """Return twice the matrix."""
        return 2 * super().mixing_matrix(streams)


class CannotBePickled(_WrongMixer):
    """Holds a lambda."""

    def __init__(self, config: LinearConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.double_features = lambda x: 2 * x


class ClaimsNonnegativeMatrix(_WrongMixer):
    """Claims that no entry of its matrix is negative, and its feature map is signed."""

    default_feature_map: ClassVar[str] = "identity"

    @property
    def traits(self) -> Traits:
        """The true traits, except for `positive`."""
        return replace(super().traits, positive=True)


def _build(mixer: type[LinearMixer], **options: Any) -> Callable[[], TokenMixer]:
    def build() -> TokenMixer:
        torch.manual_seed(0)
        return mixer(LinearConfig(**options), 12, 2).double()

    return build


WRONG_MIXERS: Mapping[str, tuple[Callable[[], TokenMixer], str]] = {
    "keys leak between heads": (_build(LeaksThroughKeys), "check_heads_are_independent_in_keys"),
    "queries leak between heads": (_build(LeaksThroughQueries), "check_heads_are_independent_in_queries"),
    "batch items leak": (_build(LeaksThroughTheBatch, normalize=False), "check_batch_items_are_independent"),
    "the state is off by one": (
        _build(ReadsThePreviousState, causality="causal", normalize=False),
        "check_a_token_sees_itself",
    ),
    "the diagonal counts twice": (
        _build(CountsTheDiagonalTwice, causality="bidirectional", normalize=False),
        "check_bidirectional_is_two_causal_passes",
    ),
    "tokens after the 128th are forgotten": (
        _build(ForgetsAfter128Tokens, causality="causal"),
        "check_part_of_the_matrix_is_the_matrix_of_the_part",
    ),
    "positions weigh": (_build(WeighsByPosition), "check_permutation_equivariance"),
    "the next token is seen": (_build(SeesTheNextToken, causality="causal"), "check_never_looks_ahead"),
    "sums are means": (
        _build(DividesByLength, normalize=False),
        "check_part_of_the_matrix_is_the_matrix_of_the_part",
    ),
    "rows sum to two": (_build(SumsToTwo), "check_rows_sum_to_one"),
    "it cannot be pickled": (_build(CannotBePickled), "check_pickled_copies"),
    "entries are negative": (_build(ClaimsNonnegativeMatrix, normalize=False), "check_matrix_is_nonnegative"),
}
"""What is wrong -> a function that builds the mixer, and the name of the check that has to fail."""
