"""PolaFormer: polarity-aware linear attention (Meng et al. 2025, 2501.15061)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import operators
from mixers.config import MixerConfig
from mixers.entries import register_mixer
from mixers.precision import accumulation_dtype
from mixers.stages.position_table import PositionTable
from mixers.stages.projections import Projections
from mixers.streams import Streams
from mixers.traits import Traits
from mixers.zoo.linear_attention import LinearAttention, LinearAttentionConfig

TABLE_SIZE = 14  # tokens per side at 224 px in the stage with 16 px patches


@dataclass(frozen=True)
class PolaFormerConfig(LinearAttentionConfig):
    """Options of `polaformer`.

    Attributes:
        alpha: the exponents of the features lie between 1 and 1 + alpha; 0 leaves directions unchanged.
        position_table_size: side of the table of positions added to the keys; 0: none. None: as published; 0 for causal
            mixers and for scans other than raster.
        qkv_bias: whether to_q, to_k and to_v have a bias, and to_gate.
    """

    default_local_conv_size: ClassVar[int] = 5

    gate: bool = True
    alpha: float = 4.0
    position_table_size: int | None = None
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature:
            raise ValueError("temperature=True has no effect: the scale of q and k is learned already. Leave it out.")
        has_positions = self.causality != "causal" and self.scan == "raster"
        if self.position_table_size is None:
            object.__setattr__(self, "position_table_size", TABLE_SIZE if has_positions else 0)
        if (self.position_table_size or 0) < 0 or self.alpha < 0:
            raise ValueError(
                f"Expected position_table_size ≥ 0 and alpha ≥ 0, got {self.position_table_size} and {self.alpha}."
            )
        if self.position_table_size and self.scan != "raster":
            raise ValueError(
                f"position_table_size={self.position_table_size} needs scan='raster', got scan={self.scan!r}."
            )
        if self.feature_map is not None:
            raise ValueError(
                f"feature_map={self.feature_map!r} would replace the split into signs that makes this mixer "
                "polarity-aware: leave it out, or use linear_attention."
            )


@register_mixer("polaformer")
class PolaFormer(LinearAttention):
    """PolaFormer (2501.15061): W_ij = [q⁺|q⁻]ᵖ·[k⁺|k⁻]ᵖ for one half of V, [q⁻|q⁺]ᵖ·[k⁺|k⁻]ᵖ for the other.

    x⁺ = relu(x / softplus(s)) and x⁻ = relu(−x / softplus(s)) with a learned s, p = 1 + alpha · σ(r) with a learned r
    per channel. Products of equal signs weigh the first half of the value channels of every head, those of opposite
    signs the second; rows of both are normalized. A learned table of positions is added to k. Then
    Y = (W V + dwc(V)) · to_gate(x): dwc is a 5 × 5 depthwise convolution over the image, whose weights the heads share,
    and the gate has no SiLU.

    The drop-in form has neither table, convolution nor gate.

    Deviations from the published block: the table of positions is interpolated to the size of the image, where the
    published one fixes it; keys are never reduced in space, as in the published configurations (ratio 1);
    projections start as torch's linear layers, where the published models draw weights from a normal
    distribution of deviation 0.02 and start biases at zero.
    """

    Config: ClassVar[type[MixerConfig]] = PolaFormerConfig
    drop_in_options: ClassVar[Mapping[str, Any]] = {"local_conv_size": 0, "gate": False, "position_table_size": 0}
    default_feature_map: ClassVar[str] = "relu"  # of each sign

    config: PolaFormerConfig

    def __init__(self, config: PolaFormerConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.scale_logit = nn.Parameter(torch.zeros(heads, self.key_dim))
        self.power_logit = nn.Parameter(torch.zeros(heads, self.key_dim))
        size = config.position_table_size
        self.positions = PositionTable(self.key_width, size) if size else None

    @property
    def output_options(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The gate has a bias if the projections have one, as published."""
        return {"local_conv_shared": True, "gate_activation": "identity", "gate_bias": self.config.qkv_bias}

    def create_projections(self) -> Projections:
        """Create the mixer's own projections."""
        return Projections(self.dim, self.key_width, self.value_width, qkv_bias=self.config.qkv_bias)

    def signed_features(self, streams: Streams) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the features of queries for equal and for opposite signs, and of keys.

        Returns:
            [q⁺|q⁻]ᵖ, [q⁻|q⁺]ᵖ and [k⁺|k⁻]ᵖ: (b, l, h, 2k) each, ≥ 0, float32 at least.
        """
        dtype = accumulation_dtype(streams.q)
        k = streams.k.to(dtype)
        if self.positions is not None:
            k = self.positions(k.flatten(2), streams.grid).view_as(k)
        scale = F.softplus(self.scale_logit.to(dtype))
        power = 1 + self.config.alpha * self.power_logit.to(dtype).sigmoid()
        q_parts = _split_signs(streams.q.to(dtype) / scale, power)
        k_parts = _split_signs(k / scale, power)
        return torch.cat(q_parts, dim=-1), torch.cat(q_parts[::-1], dim=-1), torch.cat(k_parts, dim=-1)

    def mix(self, streams: Streams) -> Tensor:
        """Compute W v, (b, l, h, v), in float32 at least."""
        equal, opposite, k = self.signed_features(streams)
        options = self._operator_options(streams) | {"backend": self.config.backend}
        halves = [
            cast(Tensor, operators.linear_attention(q, k, v, **options))
            for q, v in zip((equal, opposite), streams.values.split(self.half_widths, dim=-1), strict=True)
        ]
        return torch.cat(halves, dim=-1)

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """Compute W, (b, h, v, l, l), from its formula: one matrix for each half of the value channels."""
        equal, opposite, k = self.signed_features(streams)
        options = self._operator_options(streams)
        halves = [
            operators.linear_attention_matrix(q, k, **options)[:, :, None].expand(-1, -1, width, -1, -1)
            for q, width in zip((equal, opposite), self.half_widths, strict=True)
        ]
        return torch.cat(halves, dim=2)

    @property
    def half_widths(self) -> list[int]:
        """Value channels per head that products of equal signs weigh, and of opposite ones."""
        return [self.head_dim - self.head_dim // 2, self.head_dim // 2]

    @property
    def features_dim(self) -> int:
        """2k: one feature per channel and sign."""
        return 2 * self.key_dim

    @property
    def permutation_equivariant(self) -> bool:
        """Whether permuting the tokens only permutes the output: not with a table of positions."""
        return super().permutation_equivariant and not self.config.position_table_size

    @property
    def traits(self) -> Traits:
        """The properties of this mixer as configured."""
        traits = super().traits
        return replace(traits, needs_grid=traits.needs_grid or bool(self.config.position_table_size))

    def operator_state_size(self, length: int) -> int:
        """Return h·2k·v, and if normalized h·2k for the sums, which both halves share."""
        return self.heads * self.features_dim * (self.head_dim + int(self.config.normalize))

    def operator_flops(self, length: int) -> int:
        """Return the operations of two passes of linear attention, each with half of the value channels."""
        causality = self.config.causality
        sums = int(self.config.normalize and causality == "causal")
        flops = (
            operators.linear.flops(length, self.features_dim, width + sums, causality, "none")
            for width in self.half_widths
        )
        return self.heads * sum(flops)


def _split_signs(x: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positive and the negative part of (b, l, h, k), each to the powers (h, k)."""
    return x.relu() ** power, (-x).relu() ** power
