"""Sana's linear attention (Xie et al. 2024, 2410.10629)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mixers.config import MixerConfig
from mixers.entries import register_mixer
from mixers.zoo.linear_attention import LinearAttention, LinearAttentionConfig


@dataclass(frozen=True)
class SanaReLUConfig(LinearAttentionConfig):
    """Options of `sana_relu`."""

    eps: float = 1e-15


@register_mixer("sana_relu")
class SanaReLU(LinearAttention):
    """Sana (2410.10629): W_ij = relu(q_i)·relu(k_j), rows normalized.

    A token whose queries are all ≤ 0 sees nothing, and its result is 0.

    Deviations from the published block: eps = 1e-15 is added to the mean weight instead of the sum; the convolution
    in the feed-forward part (Mix-FFN) and the norms of q and k, which some models have, are left out.
    """

    Config: ClassVar[type[MixerConfig]] = SanaReLUConfig
    default_feature_map: ClassVar[str] = "relu"
