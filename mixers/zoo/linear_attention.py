"""Linear attention (Katharopoulos et al. 2020, 2006.16236)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mixers.config import MixerConfig
from mixers.entries import register_mixer
from mixers.linear_mixer import LinearConfig, LinearMixer


@dataclass(frozen=True)
class LinearAttentionConfig(LinearConfig):
    """Options of `linear_attention`; unnormalized, W is divided by √k and by `reference_length` tokens."""


@register_mixer("linear_attention")
class LinearAttention(LinearMixer):
    """Linear attention (2006.16236): W_ij = φ(q_i)·φ(k_j), φ = elu + 1, rows normalized.

    Unnormalized, W_ij = φ(q_i)·φ(k_j) / (√k · reference_length), which keeps outputs near one at that many tokens.
    """

    Config: ClassVar[type[MixerConfig]] = LinearAttentionConfig
    default_feature_map: ClassVar[str] = "elu_plus_one"

    @property
    def scale(self) -> float:
        """1 / (√k · reference_length)."""
        return 1 / (self.config.reference_length * self.key_dim**0.5)
