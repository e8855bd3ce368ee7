"""FLatten's focused linear attention (Han et al. 2023, 2308.00442)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mixers.config import MixerConfig
from mixers.entries import register_mixer
from mixers.precision import accumulation_dtype
from mixers.stages.focused import FocusedMap
from mixers.streams import Streams
from mixers.zoo.linear_attention import LinearAttention, LinearAttentionConfig


@dataclass(frozen=True)
class FocusedConfig(LinearAttentionConfig):
    """Options of `focused`.

    Attributes:
        power: p of the feature map; 1 leaves directions unchanged.
    """

    default_local_conv_size: ClassVar[int] = 5

    power: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feature_map is not None:
            raise ValueError(
                f"feature_map={self.feature_map!r} would replace the map that makes this mixer focused: leave it out, "
                f"or use linear_attention with local_conv_size={self.local_conv_size}."
            )


@register_mixer("focused")
class Focused(LinearAttention):
    """FLatten (2308.00442): W_ij = φ(q_i)·φ(k_j), φ(x) = ‖u‖ u^p / ‖u^p‖, rows normalized; Y = W V + dwc(V).

    u = (relu(x) + 1e-6) / softplus(s) with a learned s; norms are over all heads. dwc is a 5 × 5 depthwise
    convolution.

    Deviations from the published block: dwc has its own weights for every channel, where the published one shares them
    between heads, a special case; the table of positions added to k is left out, because it fixes the number of tokens.
    """

    Config: ClassVar[type[MixerConfig]] = FocusedConfig
    drop_in_options: ClassVar[Mapping[str, Any]] = {"local_conv_size": 0}
    default_feature_map: ClassVar[str] = "relu"  # which `focus` sharpens

    config: FocusedConfig

    def __init__(self, config: FocusedConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.focus = FocusedMap(heads, self.key_dim, config.power)

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Compute φ(q) and φ(k): (b, l, h, k) each, float32 at least."""
        dtype = accumulation_dtype(streams.q)
        return self.focus(streams.q.to(dtype)), self.focus(streams.k.to(dtype))
