"""Linear attention (Katharopoulos et al. 2020, 2006.16236)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mixers.linear_mixer import LinearConfig, LinearMixer
from mixers.registry import register_mixer


@dataclass(frozen=True)
class LinearAttentionConfig(LinearConfig):
    """Options of `linear_attention`.

    Attributes:
        scale_tokens: unnormalized weights are divided by this many tokens and by √k, a constant whatever
            the real number of tokens is; 256 keeps the output near one at 256 tokens.
    """

    scale_tokens: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_tokens <= 0:
            raise ValueError(f"Expected scale_tokens > 0, got {self.scale_tokens}.")


@register_mixer("linear_attention")
class LinearAttention(LinearMixer):
    """Linear attention: W = φ(q)·φ(k), φ = elu + 1."""

    Config: ClassVar[Any] = LinearAttentionConfig
    published_map: ClassVar[str] = "elu_plus_one"

    @property
    def scale(self) -> float:
        """1 / (scale_tokens · √k)."""
        return 1 / (self.config.scale_tokens * self.key_dim**0.5)
