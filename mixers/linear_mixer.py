"""Mixers whose operator is `linear_attention`: feature map, gates, sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor

from mixers import operators
from mixers.feature_maps import FEATURE_MAPS, feature_map
from mixers.mixer import MixerConfig, Streams, TokenMixer, upcast


@dataclass(frozen=True)
class LinearConfig(MixerConfig):
    """Options of every mixer on `linear_attention`.

    Attributes:
        feature_map: φ = ψ; None is the published one or, where that is signed and the mixer normalized, elu+1.
        eps: added to the mean weight where normalized, with decay to the decayed sum.
        backend: of the operator.
    """

    feature_map: str | None = None
    eps: float = 1e-6
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps < 0:
            raise ValueError(f"Expected eps ≥ 0, got {self.eps}.")


class LinearMixer(TokenMixer):
    """W = (φ(q) φ(k)ᵀ) ⊙ L. Subclasses give the gates, if there are any, and the scale.

    Subclasses set:
        default_feature_map: the feature map of the paper.
        decays: whether `gates` gives a log decay.
        per_channel_decay: whether every key channel has a gate of its own.
        divides: whether it normalizes by division, which takes a feature map that is positive.
    """

    Config: ClassVar[Any] = LinearConfig
    default_feature_map: ClassVar[str] = "identity"
    has_decay: ClassVar[bool] = False
    per_channel_decay: ClassVar[bool] = False
    normalizes_by_division: ClassVar[bool] = True

    def __init__(self, config: Any, dim: int, heads: int, *, own_projections: bool = True) -> None:
        self._map = feature_map(self.feature_map_name(config), config.normalize and self.normalizes_by_division)
        super().__init__(config, dim, heads, own_projections=own_projections)

    @classmethod
    def feature_map_name(cls, config: Any) -> str:
        """The feature map in force: the named one, else the published one, else elu+1 where it has to be positive."""
        if config.feature_map is not None:
            return cast(str, config.feature_map)
        fits = FEATURE_MAPS[cls.default_feature_map].positive or not (config.normalize and cls.normalizes_by_division)
        return cls.default_feature_map if fits else "elu_plus_one"

    def mix(self, streams: Streams) -> Tensor:
        """W v, (b, l, h, v); unnormalized in float32 at least."""
        q, k, v, feature_map = self.operands(streams)
        settings = {**self._settings(), "feature_map": feature_map, "backend": self.config.backend}
        return cast(Tensor, operators.linear_attention(q, k, v, streams.log_decay, **settings))

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """(b, h, l, l), from the formula."""
        q, k = self.features(streams)
        return operators.linear_weights(q, k, streams.log_decay, **self._settings())

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """φ(q) and φ(k), the latter times `dt` where there is one: (b, l, h, k) each, float32 at least."""
        dtype = upcast(streams.q.dtype)
        q, k = self._map.apply(streams.q.to(dtype)), self._map.apply(streams.k.to(dtype))
        return q, k if streams.dt is None else k * streams.dt[..., None]

    def operands(self, streams: Streams) -> tuple[Tensor, Tensor, Tensor, str]:
        """q, k, v and the map that the operator applies to q and k: `identity` where there is more to `features`.

        An operator that maps q and k as it reads them does not have to dt features to memory. Unnormalized, it is
        one to the result whether keys or values are times `dt`.
        """
        normalize, dt = self.config.normalize, streams.dt
        v = streams.v if normalize else streams.values
        if type(self).features is not LinearMixer.features or (normalize and dt is not None):
            return (*self.features(streams), v, "identity")
        return streams.q, streams.k, v if dt is None else v * dt[..., None], self.feature_map_name(self.config)

    @property
    def scale(self) -> float:
        """Factor of unnormalized weights: a constant of the mixer, never of the number of tokens."""
        return 1.0

    def _settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "causality": config.causality,
            "normalize": config.normalize,
            "eps": config.eps,
            "scale": self.scale,
        }

    @property
    def permutation_equivariant(self) -> bool:
        """Whether permuting the tokens permutes the output: decay has an order unless the mixer is non-causal."""
        return super().permutation_equivariant and not (self.has_decay and self.config.causality == "bidirectional")

    @property
    def positive(self) -> bool:
        """Whether every weight is ≥ 0: the feature map's are."""
        return self._map.positive

    @property
    def features_dim(self) -> int:
        """Channels a head after the feature map."""
        return self.key_dim

    @property
    def heads_per_group(self) -> int:
        """Heads that have one q and one k between them."""
        return 1

    def state_size(self, length: int) -> int:
        """h·k·(v + 1): the same after any number of tokens; one column less unnormalized."""
        return self.heads * self.features_dim * (self.head_dim + int(self.config.normalize))

    def operator_flops(self, length: int) -> int:
        """Two products of l × k by k × v; with an order also those within chunks.

        Where there is an order the row sums are a column of the products, and elsewhere elementwise work.
        """
        causality = self.config.causality
        ordered = causality == "causal" or (causality == "bidirectional" and self.has_decay)
        width = self.head_dim + int(self.config.normalize and ordered)
        decay = "none" if not self.has_decay else "vector" if self.per_channel_decay else "scalar"
        return self.heads * operators.linear.flops(
            length, self.features_dim, width, causality, decay, self.heads_per_group
        )
