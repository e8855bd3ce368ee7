"""FLatten's focused linear attention (Han et al. 2023, 2308.00442)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from mixers.config import MixerConfig
from mixers.entries import register_mixer
from mixers.precision import accumulation_dtype
from mixers.stages.focused import FocusedMap
from mixers.stages.position_table import PositionTable
from mixers.stages.projections import Projections
from mixers.streams import Streams
from mixers.traits import Traits
from mixers.zoo.linear_attention import LinearAttention, LinearAttentionConfig

TABLE_SIZE = 14  # tokens per side at 224 px in the stage with 16 px patches


@dataclass(frozen=True)
class FocusedConfig(LinearAttentionConfig):
    """Options of `focused`.

    Attributes:
        power: p of the feature map; 1 leaves directions unchanged.
        position_table_size: side of the table of positions added to the keys; 0: none. None: as published; 0 for causal
            mixers and for scans other than raster.
        qkv_bias: whether to_q, to_k and to_v have a bias.
    """

    default_local_conv_size: ClassVar[int] = 5

    power: float = 3.0
    position_table_size: int | None = None
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.position_table_size is None:
            size = TABLE_SIZE if self.causality != "causal" and self.scan == "raster" else 0
            object.__setattr__(self, "position_table_size", size)
        if self.temperature:
            raise ValueError("temperature=True has no effect: a factor of q or of k cancels. Leave it out.")
        if (self.position_table_size or 0) < 0:
            raise ValueError(f"Expected position_table_size ≥ 0, got {self.position_table_size}.")
        if self.position_table_size and self.scan != "raster":
            raise ValueError(
                f"position_table_size={self.position_table_size} needs scan='raster', got scan={self.scan!r}."
            )
        if self.feature_map is not None:
            raise ValueError(
                f"feature_map={self.feature_map!r} would replace the map that makes this mixer focused: leave it out, "
                f"or use linear_attention with local_conv_size={self.local_conv_size}."
            )


@register_mixer("focused")
class Focused(LinearAttention):
    """FLatten (2308.00442): W_ij = φ(q_i)·φ(k_j), φ(x) = ‖u‖ u^p / ‖u^p‖, rows normalized; Y = W V + dwc(V).

    u = (relu(x) + 1e-6) / softplus(s) with a learned s; norms are over all heads. A learned table of positions is
    added to k. dwc is a 5 × 5 depthwise convolution over the image, whose weights the heads share.

    Deviations from the published block: the table of positions is interpolated to the size of the image, where the
    published one fixes it; keys are never reduced in space (the published sr_ratio is 1).
    """

    Config: ClassVar[type[MixerConfig]] = FocusedConfig
    drop_in_options: ClassVar[Mapping[str, Any]] = {"local_conv_size": 0, "position_table_size": 0}
    output_options: ClassVar[Mapping[str, Any]] = {"local_conv_shared": True}
    default_feature_map: ClassVar[str] = "relu"  # which `focus` sharpens
    refused_normalizers: ClassVar[Mapping[str, str]] = {
        "decoupled": "its feature map is positive by construction, and without it the mixer is linear attention"
    }
    exceptions: ClassVar[Mapping[str, str]] = {
        "check_heads_are_independent_in_queries": "as published, the norms of the feature map are over all heads",
        "check_heads_are_independent_in_keys": "as published, the norms of the feature map are over all heads",
    }

    config: FocusedConfig

    def __init__(self, config: FocusedConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.focus = FocusedMap(heads, self.key_dim, config.power)
        size = config.position_table_size
        self.positions = PositionTable(self.key_width, size) if size else None

    def create_projections(self) -> Projections:
        """Create the mixer's own projections."""
        return Projections(self.dim, self.key_width, self.value_width, qkv_bias=self.config.qkv_bias)

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Compute φ(q) and φ(k + positions): (b, l, h, k) each, float32 at least."""
        dtype = accumulation_dtype(streams.q)
        k = streams.k.to(dtype)
        if self.positions is not None:
            k = self.positions(k.flatten(2), streams.grid).view_as(k)
        return self.focus(streams.q.to(dtype)), self.focus(k)

    def text_features(self, k: Tensor) -> Tensor:
        """Compute φ(k) of text tokens, which have no position in the image, (b, t, h, k)."""
        return self.focus(k)

    @property
    def permutation_equivariant(self) -> bool:
        """Whether permuting the tokens only permutes the output: not with a table of positions."""
        return super().permutation_equivariant and not self.config.position_table_size

    @property
    def traits(self) -> Traits:
        """The properties of this mixer as configured."""
        traits = super().traits
        return replace(traits, needs_grid=traits.needs_grid or bool(self.config.position_table_size))
