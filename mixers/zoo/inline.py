"""InLine: injective linear attention (Han et al. 2024, 2412.06590)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mixers import operators
from mixers.linear_mixer import LinearMixer
from mixers.mixer import MixerConfig, Streams
from mixers.normalization import count_visible_tokens
from mixers.precision import accumulation_dtype
from mixers.registry import register_mixer
from mixers.stages.outputs import Output


@dataclass(frozen=True)
class InLineConfig(MixerConfig):
    """Options of `inline`.

    Attributes:
        feature_map: φ; any will do, signed ones too.
        dynamic_convolution: the weights of the local convolution are computed from the mean token, else learned.
        reference_length: unnormalized weights are divided by this many tokens, a constant whatever the real number is.
        backend: of the operator.
    """

    default_local_conv_size: ClassVar[int] = 3

    feature_map: str | None = None
    dynamic_convolution: bool = True
    reference_length: int = 256
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference_length <= 0:
            raise ValueError(f"Expected reference_length > 0, got {self.reference_length}.")


class DynamicConvolution(nn.Module):
    """Output stage whose local convolution has weights that the mean token chooses, for every item and channel.

    (h·v, size²) weights = fc2(GELU(fc1(mean_j x_j))), both layers in one block a head; then all that `output` does.
    """

    def __init__(self, output: Output, dim: int, heads: int, width: int, size: int) -> None:
        super().__init__()
        output.local = None
        self.output, self.size = output, size
        self.residual = nn.Sequential(
            nn.Conv1d(dim, width, 1, groups=heads), nn.GELU(), nn.Conv1d(width, width * size**2, 1, groups=heads)
        )

    def forward(self, y: Tensor, streams: Streams) -> Tensor:
        """(b, l, h, v) -> (b, l, h, v)."""
        if streams.grid is None:
            raise ValueError(
                "A local convolution sees neighbors in the image and has to know its size: "
                "pass grid=(height, width), or do without it by local_conv_size=0."
            )
        chosen = self.residual(streams.x.mean(1)[..., None])
        kernel = chosen.reshape(-1, 1, self.size, self.size)  # (b·h·v, 1, size, size)
        v = rearrange(streams.v, "b (i j) h v -> 1 (b h v) i j", i=streams.grid[0])
        local = F.conv2d(v, kernel, padding=self.size // 2, groups=kernel.shape[0])
        local = rearrange(local, "1 (b h v) i j -> b (i j) h v", b=y.shape[0], h=y.shape[2])
        return self.output(y.to(accumulation_dtype(y)) + local, streams).to(y.dtype)


@register_mixer("inline")
class InLine(LinearMixer):
    """InLine (2412.06590): W_ij = (φ(q_i)·φ(k_j)/√k + 1 − mean_j' φ(q_i)·φ(k_j')/√k) / l; Y = W V + conv(V).

    Normalized by subtraction: rows sum to one with no division, so that different queries keep different weights;
    weights may be negative. φ is the identity as published. Means are over the visible tokens: all, or 0 … i where
    causal. normalize=False takes the correction away: W_ij = φ(q_i)·φ(k_j) / (√k · reference_length).

    conv is a 3 × 3 depthwise convolution whose weights come from the mean token (which in the published DeiT counts
    the class token, that there is none of here).
    """

    Config: ClassVar[Any] = InLineConfig
    drop_in_options: ClassVar[dict[str, Any]] = {"local_conv_size": 0}
    normalizes_by_division: ClassVar[bool] = False

    def __init__(self, config: Any, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        if config.local_conv_size and config.dynamic_convolution:
            size = config.local_conv_size
            self.output: Any = DynamicConvolution(self.output, dim, heads, self.value_width, size)

    @property
    def scale(self) -> float:
        """1 / √k, unnormalized also over reference_length."""
        return 1 / (self.key_dim**0.5 * (1 if self.config.normalize else self.config.reference_length))

    def mix(self, streams: Streams) -> Tensor:
        """W v, (b, l, h, v), float32 at least: linear attention with one feature more, which holds the correction."""
        (q, k), v = self.features(streams), streams.values
        q = q * self.scale
        if self.config.normalize:
            means = self._visible_means(k)
            q = torch.cat([q, 1 - (q * means).sum(-1, keepdim=True)], dim=-1)
            k = F.pad(k, (0, 1), value=1.0)
        y = operators.linear_attention(
            q, k, v, causality=self.config.causality, normalize=False, backend=self.config.backend
        )
        assert isinstance(y, Tensor)
        return y / self._visible(v)[:, None, None] if self.config.normalize else y

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """(b, h, l, l), from the formula."""
        q, k = self.features(streams)
        scores = operators.linear_weights(
            q, k, causality=self.config.causality, normalize=False, eps=0.0, scale=self.scale
        )
        if not self.config.normalize:
            return scores
        seen, counts = torch.ones_like(scores), self._visible(q)[:, None]
        seen = seen.tril() if self.config.causality == "causal" else seen
        return (scores + seen * (1 - scores.sum(-1, keepdim=True) / counts)) / counts

    def _visible(self, like: Tensor) -> Tensor:
        return count_visible_tokens(like, self.config.causality, 0)

    def _visible_means(self, k: Tensor) -> Tensor:
        """(b, l, h, k), or (b, 1, h, k) where all see the same."""
        if self.config.causality != "causal":
            return k.mean(1, keepdim=True)
        return k.cumsum(1) / self._visible(k)[:, None, None]

    @property
    def positive(self) -> bool:
        """Not where a mean is subtracted."""
        return super().positive and not self.config.normalize

    def state_size(self, length: int) -> int:
        """h·k·v; normalized also the sum of the values and that of the keys."""
        more = self.head_dim + self.key_dim if self.config.normalize else 0
        return self.heads * (self.key_dim * self.head_dim + more)

    def mixing_flops(self, length: int) -> int:
        """Those of the operator, of the parts around it, and of choosing the weights of the convolution."""
        config, width = self.config, self.value_width
        chosen = config.local_conv_size**2 if config.dynamic_convolution else 0
        choosing = 2 * width * (self.dim + chosen * width) // self.heads if chosen else 0
        return super().mixing_flops(length) + choosing

    def operator_flops(self, length: int) -> int:
        """Those of linear attention, normalized with one feature more."""
        features = self.key_dim + int(self.config.normalize)
        return self.heads * operators.linear.flops(length, features, self.head_dim, self.config.causality, "none")
