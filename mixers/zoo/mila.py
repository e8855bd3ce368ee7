"""MILA's linear attention, also known as MLLA (Han et al. 2024, 2405.16605)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from mixers import operators
from mixers.config import MixerConfig
from mixers.context import RotaryPlacement
from mixers.entries import register_mixer
from mixers.image_grid import ImageGrid
from mixers.linear_context import divide
from mixers.normalization import count_visible_tokens
from mixers.stages.projections import ProjectionLayers, Projections
from mixers.stages.rotary import rotary_2d
from mixers.state_space_mixer import SELECTIONS, Selection
from mixers.streams import Streams
from mixers.suggest import unknown_name
from mixers.traits import Traits
from mixers.zoo.linear_attention import LinearAttention, LinearAttentionConfig


@dataclass(frozen=True)
class MILAConfig(LinearAttentionConfig):
    """Options of `mila`.

    Attributes:
        selection: what q and k are computed from: `inner`, the inner activation after the convolution, as published;
            or `input`, the tokens.
        qkv_bias: whether to_q, to_k and to_v have a bias.
        rotary: rotate the features of q and k by the row and the column of their token.
    """

    default_local_conv_size: ClassVar[int] = 3
    default_conv_2d: ClassVar[bool] = True

    conv_size: int = 3
    gate: bool = True
    selection: Selection = "inner"
    qkv_bias: bool = True
    rotary: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selection not in SELECTIONS:
            raise ValueError(unknown_name("selection", self.selection, SELECTIONS))
        if self.rotary and self.scan != "raster":
            raise ValueError(
                f"rotary=True rotates by positions in the image, in raster order, but scan={self.scan!r}: use "
                "scan='raster' or rotary=False."
            )


@register_mixer("mila")
class MILA(LinearAttention):
    """MILA (2405.16605): Y = (W V + LePE(V)) · SiLU(to_gate(x)), W_ij = Rφ(q_i)·Rφ(k_j) / (φ(q_i)·mean φ(k)).

    V = SiLU(convolution(to_v(x))) with a 3 × 3 depthwise convolution over the image; q and k are computed from V. φ =
    elu + 1; R rotates half of the channels by the row and half by the column, over the full width, so that heads have
    different frequencies; LePE is another 3 × 3 depthwise convolution. The denominator is computed without R: rows sum
    to one and entries are ≥ 0 only with rotary=False, and `traits` says so. Unnormalized, W is the rotated product.

    The published form needs the grid. In a causal one the first convolution is over tokens, and there is no LePE. The
    drop-in form has no convolutions and no gate, and computes q and k from x.
    """

    Config: ClassVar[type[MixerConfig]] = MILAConfig
    drop_in_options: ClassVar[Mapping[str, Any]] = {
        "conv_size": 0,
        "local_conv_size": 0,
        "gate": False,
        "selection": "input",
    }
    output_options: ClassVar[Mapping[str, Any]] = {"gate_bias": True}

    computes_sums: ClassVar[bool] = True

    config: MILAConfig

    @property
    def convolved_width(self) -> int:
        """Channels of the short convolution: those of the values."""
        return self.value_width

    @property
    def selection_width(self) -> int:
        """Channels from which q and k are computed."""
        return self.value_width if self.config.selection == "inner" else self.dim

    def create_projections(self) -> Projections:
        """Create the mixer's own projections; to_q and to_k see what `selection` names."""
        return Projections(
            self.dim, self.key_width, self.value_width, self.selection_width, qkv_bias=self.config.qkv_bias
        )

    def compute_streams(self, x: Tensor, projections: ProjectionLayers, grid: ImageGrid | None = None) -> Streams:
        """Compute the inner activation, then q and k from it or from the tokens."""
        inner = projections.to_v(x)
        inner = inner if self.short_conv is None else self.short_conv(inner, grid)
        source = inner if self.config.selection == "inner" else x
        q = self.split_key_heads(projections.to_q(source))
        k = self.split_key_heads(projections.to_k(source))
        return Streams(x=x, q=q, k=k, v=self.split_heads(inner), grid=grid)

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Compute Rφ(q) and Rφ(k): (b, l, h, k) each, float32 at least."""
        q, k = super().features(streams)
        return (_rotate(q, streams.grid), _rotate(k, streams.grid)) if self.config.rotary else (q, k)

    @property
    def _has_separate_denominator(self) -> bool:
        """Whether W is divided by sums other than its own row sums."""
        return self.config.rotary and self.divides_by_row_sums

    def mix_directly(self, streams: Streams) -> Tensor:
        """Compute W v, (b, l, h, v), in float32 at least."""
        if not self._has_separate_denominator:
            return super().mix_directly(streams)
        return divide(*self.sums(streams))

    def denominator_features(self, streams: Streams, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Compute φ(q) and φ(k), not rotated."""
        return super().features(streams) if self._has_separate_denominator else (q, k)

    @property
    def rotary_placements(self) -> dict[RotaryPlacement, str | None]:
        """For every value of `rope`: None if it is supported, otherwise the reason."""
        if not self.config.rotary:
            return super().rotary_placements
        reason = "it rotates by positions of its own; pass rotary=False"
        return {"after_map": reason, "before_map": reason}

    def direct_matrix(self, streams: Streams) -> Tensor:
        """Compute W, (b, h, l, l), from its formula."""
        if not self._has_separate_denominator:
            return super().direct_matrix(streams)
        options = self._unnormalized_options(streams)
        rotated = operators.linear_attention_matrix(*self.features(streams), **options)
        sums = operators.linear_attention_matrix(*super().features(streams), **options).sum(-1, keepdim=True)
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
        normalized = traits.normalized and not self._has_separate_denominator
        return replace(traits, normalized=normalized, needs_grid=traits.needs_grid or rotary)

    def projection_flops(self, length: int) -> int:
        """Return the share of `flops` of the four projections."""
        return 4 * length * (self.selection_width * self.key_width + self.dim * self.value_width)

    def operator_flops(self, length: int) -> int:
        """Return the operations of linear attention, and of a second pass for a separate denominator."""
        if not self._has_separate_denominator:
            return super().operator_flops(length)
        causality = self.config.causality
        numerator = operators.linear.flops(length, self.key_dim, self.head_dim, causality, "none")
        denominator = operators.linear.flops(length, self.key_dim, 1, causality, "none")
        return self.heads * (numerator + denominator)


def _rotate(x: Tensor, grid: ImageGrid | None) -> Tensor:
    """Rotate (b, l, h, k) by the row and column of each token, over the full width h·k."""
    return rotary_2d(x.flatten(2)[:, :, None], grid).view_as(x)
