"""MILA's linear attention, also known as MLLA (Han et al. 2024, 2405.16605)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from mixers import operators
from mixers.mixer import Streams
from mixers.normalization import count_visible_tokens
from mixers.registry import register_mixer
from mixers.stages.rotary import rotary_2d
from mixers.traits import Traits
from mixers.zoo.linear_attention import LinearAttention, LinearAttentionConfig


@dataclass(frozen=True)
class MILAConfig(LinearAttentionConfig):
    """Options of `mila`.

    Attributes:
        rotary: turn the features of q and k by the row and the column of their token.
    """

    default_local_conv_size: ClassVar[int] = 3

    gate: bool = True
    rotary: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotary and self.scan != "raster":
            raise ValueError(
                f"scan={self.scan!r} does not go with rotary=True, which turns by places in the image, read in raster "
                "order: use scan='raster' or rotary=False."
            )


@register_mixer("mila")
class MILA(LinearAttention):
    """MILA (2405.16605): Y = (W V + LePE(V)) · SiLU(to_gate(x)), W_ij = Rφ(q_i)·Rφ(k_j) / (φ(q_i)·mean φ(k)).

    φ = elu + 1, R turns half of the channels by the row and half by the column (over the full width, so that heads
    have frequencies of their own), LePE is a 3 × 3 depthwise convolution. What W is divided by has no R: rows sum to
    one, and weights are ≥ 0, only with rotary=False, and `traits` says so. Unnormalized it is the turned product.
    The published form needs the grid; a causal one has no LePE, and the drop-in form neither LePE nor gate.

    Of the published block, a linear layer, 3 × 3 depthwise convolution and SiLU before q, k and v are left out, and v
    is to_v(x) where the block takes what comes out of these as it is; the gate's layer has no bias.
    """

    Config: ClassVar[Any] = MILAConfig
    drop_in_options: ClassVar[dict[str, Any]] = {"local_conv_size": 0, "gate": False}

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Rφ(q) and Rφ(k): (b, l, h, k) each, float32 at least."""
        q, k = super().features(streams)
        return (self._turned(q, streams.grid), self._turned(k, streams.grid)) if self.config.rotary else (q, k)

    def _turned(self, x: Tensor, grid: tuple[int, int] | None) -> Tensor:
        return rotary_2d(x.flatten(2)[:, :, None], grid).view_as(x)

    @property
    def _apart(self) -> bool:
        """Whether weights are divided by sums that are not their own."""
        return bool(self.config.rotary and self.config.normalize)

    def mix(self, streams: Streams) -> Tensor:
        """W v, (b, l, h, v), float32 at least."""
        if not self._apart:
            return super().mix(streams)
        v = streams.values
        plain = super().features(streams)
        settings = {**self._settings(), "normalize": False, "scale": 1.0, "backend": self.config.backend}
        y = operators.linear_attention(*self.features(streams), v, **settings)
        sums = operators.linear_attention(*plain, v.new_ones(*v.shape[:3], 1), **settings)
        assert isinstance(y, Tensor) and isinstance(sums, Tensor)
        return y / (sums + self.config.eps * count_visible_tokens(v, self.config.causality, 0)[:, None, None])

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """(b, h, l, l), from the formula."""
        if not self._apart:
            return super().mixing_matrix(streams)
        settings = {**self._settings(), "normalize": False, "scale": 1.0}
        turned = operators.linear_weights(*self.features(streams), **settings)
        sums = operators.linear_weights(*super().features(streams), **settings).sum(-1, keepdim=True)
        return turned / (sums + self.config.eps * count_visible_tokens(streams.q, self.config.causality, 0)[:, None])

    @property
    def permutation_equivariant(self) -> bool:
        """Not with rotation."""
        return super().permutation_equivariant and not self.config.rotary

    @property
    def positive(self) -> bool:
        """Not with rotation, which gives features signs."""
        return super().positive and not self.config.rotary

    @property
    def traits(self) -> Traits:
        """What this mixer, as configured, promises."""
        told, rotary = super().traits, self.config.rotary
        return replace(told, normalized=told.normalized and not rotary, needs_grid=told.needs_grid or rotary)

    def operator_flops(self, length: int) -> int:
        """Those of linear attention; the sums that W is divided by are a pass of their own where there is rotation."""
        if not self._apart:
            return super().operator_flops(length)
        widths, causality = (self.head_dim, 1), self.config.causality
        return self.heads * sum(operators.linear.flops(length, self.key_dim, w, causality, "none") for w in widths)
