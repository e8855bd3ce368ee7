"""InLine: injective linear attention (Han et al. 2024, 2412.06590)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mixers.config import MixerConfig
from mixers.entries import register_mixer
from mixers.image_grid import require_grid
from mixers.linear_mixer import LinearConfig, LinearMixer
from mixers.precision import accumulation_dtype
from mixers.stages.normalizers import NormalizerName
from mixers.stages.outputs import Output
from mixers.stages.projections import Projections
from mixers.streams import Streams


@dataclass(frozen=True)
class InLineConfig(LinearConfig):
    """Options of `inline`.

    Attributes:
        dynamic_conv: the weights of the local convolution are computed from the mean token; otherwise learned.
        qkv_bias: whether to_q, to_k and to_v have a bias.
    """

    default_local_conv_size: ClassVar[int] = 3
    default_normalizer: ClassVar[NormalizerName] = "subtract"

    dynamic_conv: bool = True
    qkv_bias: bool = True


class DynamicConvolution(nn.Module):
    """Output stage whose local convolution has weights computed from the mean token, per item and channel.

    (h·v, size²) weights = fc2(GELU(fc1(mean_j x_j))), each layer with one block per head; then the parts of `output`.

    Args:
        output: the output stage that follows.
        dim: model width d.
        heads: number of heads h.
        width: value channels of all heads, h·v.
        size: side of the window, odd.
    """

    def __init__(self, output: Output, dim: int, heads: int, width: int, size: int) -> None:
        super().__init__()
        output.local_conv = None
        self.output = output
        self.size = size
        self.residual = nn.Sequential(
            nn.Conv1d(dim, width, 1, groups=heads), nn.GELU(), nn.Conv1d(width, width * size**2, 1, groups=heads)
        )

    def forward(self, y: Tensor, streams: Streams) -> Tensor:
        """Map the operator's result (b, l, h, v) to (b, l, h, v)."""
        batch, length, heads, _ = y.shape
        height, _ = require_grid(streams.grid, length, "A local convolution", "local_conv_size=0")
        if batch == 0:  # conv2d refuses zero groups
            return self.output(y, streams)
        weights = self.residual(streams.x.mean(1)[..., None])
        kernel = weights.reshape(-1, 1, self.size, self.size)  # (b·h·v, 1, size, size)
        image = rearrange(streams.v, "b (i j) h v -> 1 (b h v) i j", i=height)
        local = F.conv2d(image, kernel, padding=self.size // 2, groups=kernel.shape[0])
        local = rearrange(local, "1 (b h v) i j -> b (i j) h v", b=batch, h=heads)
        return self.output(y.to(accumulation_dtype(y)) + local, streams).to(y.dtype)


@register_mixer("inline")
class InLine(LinearMixer):
    """InLine (2412.06590): W_ij = (φ(q_i)·φ(k_j)/√k + 1 − mean_j' φ(q_i)·φ(k_j')/√k) / l; Y = W V + conv(V).

    Normalized by subtraction: rows sum to one without a division, so that different queries keep different rows;
    entries may be negative. φ is the identity, as published. Means are over the visible tokens: all, or 0 … i if
    causal. normalize=False removes the correction: W_ij = φ(q_i)·φ(k_j) / (√k · reference_length).
    `normalizer="subtract"` normalizes every other mixer in this way.

    conv is a 3 × 3 depthwise convolution whose weights are computed from the mean token.

    Deviations from the published block: in DeiT that mean includes the class token, which does not exist here.
    """

    Config: ClassVar[type[MixerConfig]] = InLineConfig
    drop_in_options: ClassVar[Mapping[str, Any]] = {"local_conv_size": 0}

    config: InLineConfig

    def __init__(self, config: InLineConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        if config.local_conv_size and config.dynamic_conv:
            assert isinstance(self.output, Output)
            self.output = DynamicConvolution(self.output, dim, heads, self.value_width, config.local_conv_size)

    def create_projections(self) -> Projections:
        """Create the mixer's own projections."""
        return Projections(self.dim, self.key_width, self.value_width, qkv_bias=self.config.qkv_bias)

    @property
    def scale(self) -> float:
        """1 / (√k · reference_length)."""
        return 1 / (self.config.reference_length * self.key_dim**0.5)

    def mixing_flops(self, length: int) -> int:
        """Add the operations that compute the weights of the convolution."""
        config = self.config
        if not (config.local_conv_size and config.dynamic_conv):
            return super().mixing_flops(length)
        weights = self.value_width * config.local_conv_size**2
        return super().mixing_flops(length) + 2 * self.value_width * (self.dim + weights) // self.heads
