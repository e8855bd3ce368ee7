"""LinFusion's generalized linear attention (Liu et al. 2024, 2409.02097)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mixers.registry import register_mixer
from mixers.stages.projections import ResidualMLP
from mixers.zoo.linear_attention import LinearAttention, LinearAttentionConfig


@dataclass(frozen=True)
class LinFusionConfig(LinearAttentionConfig):
    """Options of `linfusion`.

    Attributes:
        mid_dim: width of the two MLPs; None is the model width, as published for SD-1.5.
    """

    eps: float = 1e-4
    mid_dim: int | None = None


@register_mixer("linfusion")
class LinFusion(LinearAttention):
    """LinFusion: linear attention whose q and k see x + MLP(x); W/(q·mean k + 1e-4)."""

    Config: ClassVar[Any] = LinFusionConfig
    tiny_options: ClassVar[dict[str, Any]] = {"mid_dim": 4}

    def __init__(self, config: Any, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        mid = dim if config.mid_dim is None else config.mid_dim
        if mid <= 0:
            raise ValueError(f"mid_dim must be positive, or None for the model width; got {mid}.")
        self.mid_dim = mid
        self.for_q, self.for_k = ResidualMLP(dim, mid), ResidualMLP(dim, mid)

    def projection_inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What to_q and to_k see: x + MLP(x), one MLP each."""
        return self.for_q(x), self.for_k(x)

    def mixing_flops(self, length: int) -> int:
        """Those of linear attention, and the two MLPs'."""
        return super().mixing_flops(length) + 8 * length * self.dim * self.mid_dim
