"""FLatten's focused linear attention (Han et al. 2023, 2308.00442)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mixers.mixer import Streams, upcast
from mixers.registry import register_mixer
from mixers.stages.focused import FocusedMap
from mixers.zoo.linear_attention import LinearAttention, LinearAttentionConfig


@dataclass(frozen=True)
class FocusedConfig(LinearAttentionConfig):
    """Options of `focused`.

    Attributes:
        power: p of the map; 1 leaves directions as they are.
    """

    default_local_conv_size: ClassVar[int] = 5

    power: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feature_map is not None:
            raise ValueError(
                f"feature_map={self.feature_map!r} would replace what makes this mixer focused: leave it out, or use "
                f"linear_attention with local_conv_size={self.local_conv_size}."
            )


@register_mixer("focused")
class Focused(LinearAttention):
    """FLatten (2308.00442): W_ij = φ(q_i)·φ(k_j), φ(x) = ‖u‖ u^p / ‖u^p‖, rows normalized; Y = W V + dwc(V).

    u = (relu(x) + 1e-6) / softplus(s) with a learned s, and norms over all heads. The 5 × 5 depthwise convolution dwc
    has weights for every channel; the published one shares them between the heads, which is a special case. The
    published table of positions that is added to k is left out: it is tied to one number of tokens.
    """

    Config: ClassVar[Any] = FocusedConfig
    drop_in_options: ClassVar[dict[str, Any]] = {"local_conv_size": 0}
    default_feature_map: ClassVar[str] = "relu"  # what `focus` sharpens

    def __init__(self, config: Any, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.focus = FocusedMap(heads, self.key_dim, config.power)

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """φ(q) and φ(k): (b, l, h, k) each, float32 at least."""
        dtype = upcast(streams.q.dtype)
        return self.focus(streams.q.to(dtype)), self.focus(streams.k.to(dtype))
