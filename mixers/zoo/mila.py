"""MILA's linear attention, also known as MLLA (Han et al. 2024, 2405.16605)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from mixers import operators
from mixers.config import MixerConfig
from mixers.entries import register_mixer
from mixers.image_grid import Grid
from mixers.normalization import count_visible_tokens
from mixers.stages.rotary import rotary_2d
from mixers.streams import Streams
from mixers.traits import Traits
from mixers.zoo.linear_attention import LinearAttention, LinearAttentionConfig


@dataclass(frozen=True)
class MILAConfig(LinearAttentionConfig):
    """Options of `mila`.

    Attributes:
        rotary: rotate the features of q and k by the row and the column of their token.
    """

    default_local_conv_size: ClassVar[int] = 3

    gate: bool = True
    rotary: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotary and self.scan != "raster":
            raise ValueError(
                f"rotary=True rotates by positions in the image, in raster order, but scan={self.scan!r}: use "
                "scan='raster' or rotary=False."
            )


@register_mixer("mila")
class MILA(LinearAttention):
    """MILA (2405.16605): Y = (W V + LePE(V)) · SiLU(to_gate(x)), W_ij = Rφ(q_i)·Rφ(k_j) / (φ(q_i)·mean φ(k)).

    φ = elu + 1; R rotates half of the channels by the row and half by the column, over the full width, so that heads
    have different frequencies; LePE is a 3 × 3 depthwise convolution. The denominator is computed without R: rows sum
    to one and entries are ≥ 0 only with rotary=False, and `traits` says so. Unnormalized, W is the rotated product.
    The published form needs the grid; a causal one has no LePE, and the drop-in form neither LePE nor gate.

    Deviations from the published block: the linear layer, 3 × 3 depthwise convolution and SiLU before q, k and v are
    left out; v is to_v(x), where the block takes the output of these parts; the gate's layer has no bias.
    """

    Config: ClassVar[type[MixerConfig]] = MILAConfig
    drop_in_options: ClassVar[Mapping[str, Any]] = {"local_conv_size": 0, "gate": False}

    config: MILAConfig

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Compute Rφ(q) and Rφ(k): (b, l, h, k) each, float32 at least."""
        q, k = super().features(streams)
        return (_rotate(q, streams.grid), _rotate(k, streams.grid)) if self.config.rotary else (q, k)

    @property
    def _has_separate_denominator(self) -> bool:
        """Whether W is divided by sums other than its own row sums."""
        return self.config.rotary and self.config.normalize

    def mix(self, streams: Streams) -> Tensor:
        """Compute W v, (b, l, h, v), in float32 at least."""
        if not self._has_separate_denominator:
            return super().mix(streams)
        v = streams.values
        options = self._unnormalized_options(streams) | {"backend": self.config.backend}
        y = operators.linear_attention(*self.features(streams), v, **options)
        sums = operators.linear_attention(*super().features(streams), v.new_ones(*v.shape[:3], 1), **options)
        assert isinstance(y, Tensor) and isinstance(sums, Tensor)
        return y / (sums + self._eps_per_token(v)[:, None, None])

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """Compute W, (b, h, l, l), from its formula."""
        if not self._has_separate_denominator:
            return super().mixing_matrix(streams)
        options = self._unnormalized_options(streams)
        rotated = operators.linear_weights(*self.features(streams), **options)
        sums = operators.linear_weights(*super().features(streams), **options).sum(-1, keepdim=True)
        return rotated / (sums + self._eps_per_token(streams.q)[:, None])

    def _unnormalized_options(self, streams: Streams) -> dict[str, Any]:
        return self._operator_options(streams) | {"normalize": False, "scale": 1.0}

    def _eps_per_token(self, like: Tensor) -> Tensor:
        """eps, which is added to the mean weight, times the number of visible tokens, (l,)."""
        return self.config.eps * count_visible_tokens(like, self.config.causality)

    @property
    def permutation_equivariant(self) -> bool:
        """Whether permuting the tokens only permutes the output: not with rotation by position."""
        return super().permutation_equivariant and not self.config.rotary

    @property
    def positive(self) -> bool:
        """Whether no entry of the mixing matrix is negative: not with rotation, which makes features signed."""
        return super().positive and not self.config.rotary

    @property
    def traits(self) -> Traits:
        """The properties of this mixer as configured."""
        traits = super().traits
        rotary = self.config.rotary
        return replace(traits, normalized=traits.normalized and not rotary, needs_grid=traits.needs_grid or rotary)

    def operator_flops(self, length: int) -> int:
        """Return the operations of linear attention, and of a second pass for a separate denominator."""
        if not self._has_separate_denominator:
            return super().operator_flops(length)
        causality = self.config.causality
        numerator = operators.linear.flops(length, self.key_dim, self.head_dim, causality, "none")
        denominator = operators.linear.flops(length, self.key_dim, 1, causality, "none")
        return self.heads * (numerator + denominator)


def _rotate(x: Tensor, grid: Grid | None) -> Tensor:
    """Rotate (b, l, h, k) by the row and column of each token, over the full width h·k."""
    return rotary_2d(x.flatten(2)[:, :, None], grid).view_as(x)
