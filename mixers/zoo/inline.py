"""InLine: injective linear attention (Han et al. 2024, 2412.06590)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mixers import operators
from mixers.config import MixerConfig
from mixers.entries import register_mixer
from mixers.image_grid import require_grid
from mixers.linear_mixer import LinearMixer, Scale, check_scale
from mixers.normalization import count_visible_tokens
from mixers.precision import accumulation_dtype
from mixers.stages.outputs import Output
from mixers.stages.projections import Projections
from mixers.streams import Streams


@dataclass(frozen=True)
class InLineConfig(MixerConfig):
    """Options of `inline`.

    Attributes:
        feature_map: φ, positive or signed.
        dynamic_conv: the weights of the local convolution are computed from the mean token; otherwise learned.
        qkv_bias: whether to_q, to_k and to_v have a bias.
        scale: factor of unnormalized weights, as in `LinearConfig`.
        reference_length: unnormalized weights are divided by this many tokens, whatever the number of tokens is.
        backend: implementation of the operator.
    """

    default_local_conv_size: ClassVar[int] = 3

    feature_map: str | None = None
    dynamic_conv: bool = True
    qkv_bias: bool = True
    scale: Scale = "constant"
    reference_length: int = 256
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale(self.scale, self.reference_length, normalize=self.normalize, causal=self.causality == "causal")


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

    conv is a 3 × 3 depthwise convolution whose weights are computed from the mean token.

    Deviations from the published block: in DeiT that mean includes the class token, which does not exist here.
    """

    Config: ClassVar[type[MixerConfig]] = InLineConfig
    drop_in_options: ClassVar[Mapping[str, Any]] = {"local_conv_size": 0}
    normalizes_by_division: ClassVar[bool] = False

    config: InLineConfig  # type: ignore[assignment]  # no eps, because nothing is divided by a sum of weights

    def __init__(self, config: InLineConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)  # type: ignore[arg-type]
        if config.local_conv_size and config.dynamic_conv:
            assert isinstance(self.output, Output)
            self.output = DynamicConvolution(self.output, dim, heads, self.value_width, config.local_conv_size)

    def create_projections(self) -> Projections:
        """Create the mixer's own projections."""
        return Projections(self.dim, self.key_width, self.value_width, qkv_bias=self.config.qkv_bias)

    @property
    def scale(self) -> float:
        """1 / √k if normalized, else 1 / (√k · reference_length)."""
        return 1 / (self.key_dim**0.5 * (1 if self.config.normalize else self.config.reference_length))

    def mix(self, streams: Streams) -> Tensor:
        """Compute W v, (b, l, h, v), in float32 at least.

        Linear attention with one more feature, which holds the correction.
        """
        q, k = self.features(streams)
        v = streams.values
        q = q * self.scale_at(v.shape[1])
        if self.config.normalize:
            correction = 1 - (q * self._visible_means(k)).sum(-1, keepdim=True)
            q = torch.cat([q, correction], dim=-1)
            k = F.pad(k, (0, 1), value=1.0)
        y = operators.linear_attention(
            q, k, v, causality=self.config.causality, normalize=False, backend=self.config.backend
        )
        assert isinstance(y, Tensor)
        return y / self._visible_counts(v)[:, None, None] if self.config.normalize else y

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """Compute W, (b, h, l, l), from its formula."""
        q, k = self.features(streams)
        causality = self.config.causality
        scores = operators.linear_attention_matrix(
            q, k, causality=causality, normalize=False, eps=0.0, scale=self.scale_at(q.shape[1])
        )
        if not self.config.normalize:
            return scores
        counts = self._visible_counts(q)[:, None]
        visible = torch.ones_like(scores).tril() if causality == "causal" else torch.ones_like(scores)
        return (scores + visible * (1 - scores.sum(-1, keepdim=True) / counts)) / counts

    def _visible_counts(self, like: Tensor) -> Tensor:
        return count_visible_tokens(like, self.config.causality)

    def _visible_means(self, k: Tensor) -> Tensor:
        """Average the keys that each token sees: (b, l, h, k), or (b, 1, h, k) if all tokens see the same."""
        if self.config.causality != "causal":
            return k.mean(1, keepdim=True)
        return k.cumsum(1) / self._visible_counts(k)[:, None, None]

    @property
    def positive(self) -> bool:
        """Whether no entry of the mixing matrix is negative; subtracting a mean gives negative ones."""
        return super().positive and not self.config.normalize

    def state_size(self, length: int) -> int:
        """Return h·k·v, and if normalized also the sizes of the sums of the values and of the keys."""
        sums = self.head_dim + self.key_dim if self.config.normalize else 0
        return self.heads * (self.key_dim * self.head_dim + sums)

    def mixing_flops(self, length: int) -> int:
        """Add the operations that compute the weights of the convolution."""
        config = self.config
        if not (config.local_conv_size and config.dynamic_conv):
            return super().mixing_flops(length)
        weights = self.value_width * config.local_conv_size**2
        return super().mixing_flops(length) + 2 * self.value_width * (self.dim + weights) // self.heads

    def operator_flops(self, length: int) -> int:
        """Return the operations of linear attention, with one more feature if normalized."""
        features = self.key_dim + int(self.config.normalize)
        return self.heads * operators.linear.flops(length, features, self.head_dim, self.config.causality, "none")
