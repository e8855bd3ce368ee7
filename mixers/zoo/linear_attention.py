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
        reference_length: unnormalized weights are divided by this many tokens and by √k, a constant whatever
            the real number of tokens is; 256 keeps the output near one at 256 tokens.
    """

    reference_length: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference_length <= 0:
            raise ValueError(f"Expected reference_length > 0, got {self.reference_length}.")


@register_mixer("linear_attention")
class LinearAttention(LinearMixer):
    """Linear attention: W = φ(q)·φ(k), φ = elu + 1."""

    Config: ClassVar[Any] = LinearAttentionConfig
    default_feature_map: ClassVar[str] = "elu_plus_one"

    @property
    def scale(self) -> float:
        """1 / (reference_length · √k)."""
        return 1 / (self.config.reference_length * self.key_dim**0.5)
