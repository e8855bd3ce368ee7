"""Linear attention (Katharopoulos et al. 2020, 2006.16236)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor

from mixers import operators
from mixers.mixer import MixerConfig, TokenMixer, upcast
from mixers.registry import register_mixer
from mixers.stages.feature_maps import feature_map
from mixers.traits import Traits


@dataclass(frozen=True)
class LinearAttentionConfig(MixerConfig):
    """Options of `linear_attention`.

    Attributes:
        feature_map: φ = ψ.
        eps: added to the mean weight where normalised.
        scale_tokens: unnormalised weights are divided by this many tokens and by √k, a constant whatever
            the real number of tokens is; 256 keeps the output near one at 256 tokens.
        backend: of the operator.
    """

    feature_map: str = "elu_plus_one"
    eps: float = 1e-6
    scale_tokens: int = 256
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.eps < 0 or self.scale_tokens <= 0:
            raise ValueError(f"Expected eps ≥ 0 and scale_tokens > 0, got {self.eps} and {self.scale_tokens}.")


@register_mixer("linear_attention")
class LinearAttention(TokenMixer):
    """Linear attention: W = φ(q)·φ(k), φ = elu + 1."""

    Config: ClassVar[Any] = LinearAttentionConfig

    def __init__(self, config: Any, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.feature_map = feature_map(config.feature_map, config.normalize)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """W v for the mapped queries and keys, (b, l, h, v)."""
        q, k = self._features(q, k)
        return cast(Tensor, operators.linear_attention(q, k, v, backend=self.config.backend, **self._settings()))

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """(b, h, l, l), from the formula."""
        q, k = self._features(q, k)
        return operators.linear_weights(q, k, **self._settings())

    def _features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        dtype = upcast(q.dtype)
        return self.feature_map.apply(q.to(dtype)), self.feature_map.apply(k.to(dtype))

    def _settings(self) -> dict[str, Any]:
        config = self.config
        scale = 1 / (config.scale_tokens * self.head_dim**0.5)
        return {"causality": config.causality, "normalize": config.normalize, "eps": config.eps, "scale": scale}

    @property
    def traits(self) -> Traits:
        """What this mixer, as configured, promises."""
        return Traits(
            causality=self.config.causality,
            normalized=self.config.normalize,
            positive=self.feature_map.positive,
            order_free=self.config.causality != "causal",
            linear=True,
        )

    def state_size(self, length: int) -> int:
        """h·k·(v + 1): the same after any number of tokens; one column less unnormalised."""
        return self.heads * self.head_dim * (self.head_dim + int(self.config.normalize))

    def mixing_flops(self, length: int) -> int:
        """Two products of l × k by k × v; causal adds the block-diagonal part, 64 tokens wide."""
        width = self.head_dim + int(self.config.normalize)
        within = 64 * (self.head_dim + width) if self.config.causality == "causal" else 0
        return 2 * length * self.heads * (2 * self.head_dim * width + within)
