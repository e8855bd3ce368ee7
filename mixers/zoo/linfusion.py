"""LinFusion's generalized linear attention (Liu et al. 2024, 2409.02097)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mixers.config import MixerConfig
from mixers.entries import register_mixer
from mixers.stages.projections import ResidualMLP
from mixers.zoo.linear_attention import LinearAttention, LinearAttentionConfig


@dataclass(frozen=True)
class LinFusionConfig(LinearAttentionConfig):
    """Options of `linfusion`.

    Attributes:
        mid_dim: width of the two MLPs. None: the model width, as published for SD-1.5.
    """

    eps: float = 1e-4
    mid_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mid_dim is not None and self.mid_dim <= 0:
            raise ValueError(f"mid_dim must be positive, or None for the model width; got {self.mid_dim}.")


@register_mixer("linfusion")
class LinFusion(LinearAttention):
    """LinFusion (2409.02097): linear attention whose to_q and to_k see x + MLP(x); W_ij = φ(q_i)·φ(k_j), normalized.

    φ = elu + 1, and eps = 1e-4 is added to the mean weight, as published.

    Deviations from the published block: the last layer of each MLP starts at zero, so that a new mixer is exactly
    linear attention, where the published one starts at random.
    """

    Config: ClassVar[type[MixerConfig]] = LinFusionConfig
    tiny_options: ClassVar[Mapping[str, Any]] = {"mid_dim": 4}

    config: LinFusionConfig

    def __init__(self, config: LinFusionConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.mid_dim = dim if config.mid_dim is None else config.mid_dim
        self.for_q = ResidualMLP(dim, self.mid_dim)
        self.for_k = ResidualMLP(dim, self.mid_dim)

    def projection_inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of to_q and to_k: x + MLP(x), with one MLP each."""
        return self.for_q(x), self.for_k(x)

    def mixing_flops(self, length: int) -> int:
        """Add the operations of the two MLPs."""
        return super().mixing_flops(length) + 8 * length * self.dim * self.mid_dim
