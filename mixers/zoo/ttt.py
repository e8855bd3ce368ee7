"""Test-time training without an order: ViT³ (Han et al. 2025, 2512.01643) and T⁵ (2605.02772)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from mixers.config import MixerConfig
from mixers.entries import register_mixer
from mixers.image_grid import ImageGrid, require_grid
from mixers.mixer import TokenMixer
from mixers.precision import accumulation_dtype, no_autocast
from mixers.stages.convolutions import LocalConvolution
from mixers.stages.fast_weights import (
    INNER_MODELS,
    ConvolutionModel,
    InnerLoss,
    InnerStep,
    LinearModel,
)
from mixers.stages.projections import ProjectionLayers, Projections
from mixers.streams import Streams
from mixers.suggest import unknown_name
from mixers.traits import Traits

PUBLISHED: dict[str, dict[str, Any]] = {
    "swiglu": {
        **{"inner_loss": "dot", "loss_scale": 1 / 3, "clip_gradient": True, "conv_branch": True},
        **{"normalize_keys": False, "qk_conv_size": 0},
    },
    "mlp": {
        **{"inner_loss": "mse", "loss_scale": None, "clip_gradient": False, "conv_branch": False},
        **{"normalize_keys": True, "qk_conv_size": 3},
    },
    "linear": {
        **{"inner_loss": "mse", "loss_scale": None, "clip_gradient": False, "conv_branch": False},
        **{"normalize_keys": False, "qk_conv_size": 0},
    },
}
"""The options of each inner model: ViT³'s block, T⁵'s block, and a linear model without further parts."""


@dataclass(frozen=True)
class TTTConfig(MixerConfig):
    """Options of `ttt`; None is the value of the paper that publishes the inner model.

    Attributes:
        inner: the inner model of every head, a key of `INNER_MODELS`: `swiglu` (ViT³), `mlp` (T⁵) or `linear`.
        inner_loss: `dot` or `mse`.
        inner_lr: learning rate of the step.
        loss_scale: factor of the inner loss. None: 1/3 for `swiglu`, otherwise 1 / √k.
        clip_gradient: divide every column g of a gradient by ‖g‖ + 1.
        normalize_keys: subtract from every key channel its mean over the tokens, and divide by √(variance + 1).
        qk_conv_size: side of a depthwise convolution of q and of k over the image, which is added to them; 0: none.
        conv_branch: add a head whose inner model is a 3 × 3 depthwise convolution of the image. It needs queries, keys
            and values of its own, and therefore the mixer's own projections.
        qkv_bias: whether to_q, to_k and to_v have a bias.
    """

    normalize: bool = False
    inner: str = "swiglu"
    inner_loss: InnerLoss | None = None
    inner_lr: float = 1.0
    loss_scale: float | None = None
    clip_gradient: bool | None = None
    normalize_keys: bool | None = None
    qk_conv_size: int | None = None
    conv_branch: bool | None = None
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner not in INNER_MODELS:
            raise ValueError(unknown_name("inner model", self.inner, INNER_MODELS))
        for option, value in PUBLISHED[self.inner].items():
            if getattr(self, option) is None:
                object.__setattr__(self, option, value)
        if self.inner_loss not in get_args(InnerLoss):
            raise ValueError(unknown_name("inner loss", str(self.inner_loss), get_args(InnerLoss)))
        if self.inner_lr <= 0 or (self.loss_scale is not None and self.loss_scale <= 0):
            raise ValueError(f"Expected inner_lr > 0 and loss_scale > 0, got {self.inner_lr} and {self.loss_scale}.")
        if self.scan != "raster" and (self.qk_conv_size or self.conv_branch):
            raise ValueError(
                f"qk_conv_size={self.qk_conv_size} and conv_branch={self.conv_branch} are over the image in raster "
                f"order, but scan={self.scan!r}: use scan='raster'."
            )
        if self.conv_branch and self.expand != 1:
            raise ValueError(f"conv_branch needs values as wide as the keys, expand=1, got expand={self.expand}.")


@register_mixer(
    "ttt",
    causalities=("noncausal",),
    normalizations=(False,),
    unsupported={
        "causal": "one step on all tokens at once has no order; a step after every token is the delta rule: use "
        "gated_deltanet",
        "bidirectional": "without an order, two passes are the non-causal form",
        "True": "weights of a gradient step are signed products, so that row sums can vanish",
    },
)
class TTT(TokenMixer):
    """Test-time training (2512.01643): y_i = f_W(q_i), W = W₀ − ∂ℓ/∂W₀: one step of an inner model f on all (k, v).

    ViT³, inner="swiglu": f(k) = (k W₁) ⊙ SiLU(k W₂) per head and the loss −(1/3l) Σ f(k_j)·v_j; every column g of a
    gradient is divided by ‖g‖ + 1. One more head has a 3 × 3 depthwise convolution as its inner model. T⁵ (2605.02772),
    inner="mlp": f(k) = SiLU(k W₁) W₂ and the loss (1/2l√k) Σ ‖f(k_j) − v_j‖²; keys are normalized over the tokens, and
    a 3 × 3 depthwise convolution is added to q and to k.

    inner="linear" is a matrix of the library's form: Y = q W₀ + c q Kᵀ(V − K W₀) / l with c = inner_lr · loss_scale, so
    W = c q Kᵀ / l, unnormalized linear attention with the identity as feature map and the mean scale; what W₀ adds does
    not depend on the values. The other inner models, and clipping, are not linear in the values: `mixing_matrix` is the
    derivative ∂y_ic / ∂v_jc at the given values, which for `swiglu` is the sum of two such matrices with gates on their
    queries and keys.

    The drop-in form has neither the head with the convolution nor the convolutions of q and k. Initial weights are
    normal with deviation 0.02, as published.

    Deviations from the published block: ViT³'s optional rotation of q and k is left out, and so are the scale and the
    offset of q and k, and the mean with attention in a 5 × 5 neighborhood, in T⁵'s conversion of a pretrained model;
    projections start as torch's linear layers.
    """

    Config: ClassVar[type[MixerConfig]] = TTTConfig
    drop_in_options: ClassVar[Mapping[str, Any]] = {"conv_branch": False, "qk_conv_size": 0}

    config: TTTConfig

    def __init__(self, config: TTTConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.inner = INNER_MODELS[config.inner](heads, self.key_dim, self.head_dim)
        self.conv_inner = ConvolutionModel(self.key_dim) if config.conv_branch else None
        size = config.qk_conv_size
        self.q_conv = LocalConvolution(self.key_width, size, option="qk_conv_size=0") if size else None
        self.k_conv = LocalConvolution(self.key_width, size, option="qk_conv_size=0") if size else None

    # Widths

    @property
    def mixed_heads(self) -> int:
        """h, and one more with `conv_branch`."""
        return self.heads + int(bool(self.config.conv_branch))

    @property
    def value_width(self) -> int:
        """Value channels of all heads together, of which the convolution's is one."""
        return super().value_width // self.heads * self.mixed_heads

    @property
    def key_width(self) -> int:
        """Output channels of to_q and of to_k."""
        return super().key_width // self.heads * self.mixed_heads

    def create_projections(self) -> Projections:
        """Create the mixer's own projections."""
        return Projections(self.dim, self.key_width, self.value_width, qkv_bias=self.config.qkv_bias)

    # The flow

    @property
    def step(self) -> InnerStep:
        """The gradient step of the inner models."""
        config = self.config
        assert config.inner_loss is not None
        scale = self.key_dim**-0.5 if config.loss_scale is None else config.loss_scale
        return InnerStep(config.inner_loss, config.inner_lr, scale, bool(config.clip_gradient))

    def compute_streams(self, x: Tensor, projections: ProjectionLayers, grid: ImageGrid | None = None) -> Streams:
        """Compute q, k and v; normalize keys over the tokens and convolve q and k, where configured."""
        streams = super().compute_streams(x, projections, grid)
        q = streams.q
        k = streams.k
        if self.config.normalize_keys:
            k = _normalize_over_tokens(k)
        if self.q_conv is not None and self.k_conv is not None:
            q = q + self.q_conv(q.flatten(2), grid).view_as(q)
            k = k + self.k_conv(k.flatten(2), grid).view_as(k)
        return replace(streams, q=q, k=k)

    def mix(self, streams: Streams) -> Tensor:
        """Return f_W(q), (b, l, h, v), in float32 at least; of a linear inner model the part linear in the values."""
        with no_autocast(streams.q):
            q, k, v = self._heads_first(streams)
            inner = self.inner
            if isinstance(inner, LinearModel) and self._is_linear:
                parts = [inner.values_part(q, k, v, self.step).transpose(1, 2)]
            else:
                parts = [inner(q, k, v, self.step).transpose(1, 2)]
            if self.conv_inner is not None:
                train = self.conv_inner.values_part if self._is_linear else self.conv_inner
                parts.append(train(*self._last_head(streams), self._grid(streams), self.step)[:, :, None])
            return torch.cat(parts, dim=2)

    def finish(self, y: Tensor, streams: Streams) -> Tensor:
        """Add what the initial weights of a linear inner model give, then apply the output stage."""
        inner = self.inner
        if not (isinstance(inner, LinearModel) and self._is_linear):
            return super().finish(y, streams)
        with no_autocast(streams.q):
            q, k, _ = self._heads_first(streams)
            parts = [inner.offset(q, k, self.step).transpose(1, 2)]
            if self.conv_inner is not None:
                last_query, _, _ = self._last_head(streams)
                parts.append(self.conv_inner.offset(last_query, self._grid(streams))[:, :, None])
            return super().finish(y + torch.cat(parts, dim=2), streams)

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """Compute W, (b, h, l, l), of a linear inner model; otherwise ∂y_ic / ∂v_jc, (b, h, v, l, l)."""
        with no_autocast(streams.q):
            matrix = self.inner.derivative(*self._heads_first(streams), self.step)
            if self.conv_inner is None:
                return matrix[:, :, 0] if self._is_linear else matrix
            branch = self.conv_inner.derivative(*self._last_head(streams), self._grid(streams), self.step)
            return torch.cat([matrix, branch[:, None]], dim=1)

    @property
    def _is_linear(self) -> bool:
        """Whether the result is linear in the values, but for what does not depend on them."""
        return self.config.inner == "linear" and not self.config.clip_gradient

    def _heads_first(self, streams: Streams) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v of the heads with the inner model, (b, h, l, ·) each, float32 at least."""
        dtype = accumulation_dtype(streams.q)
        q, k, v = (t[:, :, : self.heads].transpose(1, 2).to(dtype) for t in (streams.q, streams.k, streams.v))
        return q, k, v

    def _last_head(self, streams: Streams) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v of the head with the convolution, (b, l, ·) each, float32 at least."""
        dtype = accumulation_dtype(streams.q)
        q, k, v = (t[:, :, -1].to(dtype) for t in (streams.q, streams.k, streams.v))
        return q, k, v

    def _grid(self, streams: Streams) -> ImageGrid:
        return require_grid(streams.grid, streams.x.shape[1], "The head with the convolution", "conv_branch=False")

    # Traits and costs

    @property
    def permutation_equivariant(self) -> bool:
        """Whether permuting the tokens only permutes the output: without convolutions."""
        return super().permutation_equivariant and not (self.config.qk_conv_size or self.config.conv_branch)

    @property
    def positive(self) -> bool:
        """False: products of queries and keys are signed."""
        return False

    @property
    def traits(self) -> Traits:
        """The properties of this mixer as configured; gradients are means over the tokens."""
        traits = super().traits
        return replace(
            traits,
            needs_grid=traits.needs_grid or bool(self.config.qk_conv_size) or bool(self.config.conv_branch),
            repetition_invariant=self.permutation_equivariant,
            pairwise=False,
            linear_in_values=self._is_linear,
        )

    def operator_state_size(self, length: int) -> int:
        """Return the number of fast weights."""
        models = [self.inner] if self.conv_inner is None else [self.inner, self.conv_inner]
        return sum(weight.numel() for model in models for weight in model.parameters())

    def mixing_flops(self, length: int) -> int:
        """Add the operations of the convolutions of q and k."""
        size = self.config.qk_conv_size or 0
        return super().mixing_flops(length) + 4 * length * size**2 * self.key_width

    def operator_flops(self, length: int) -> int:
        """Return the operations of the inner models."""
        branch = 0 if self.conv_inner is None else self.conv_inner.flops(length, self._is_linear)
        return self.inner.flops(length, self.step) + branch


def _normalize_over_tokens(k: Tensor) -> Tensor:
    """Return (k − mean) / √(variance + 1) over the tokens of every channel, (b, l, h, k)."""
    wide = k.to(accumulation_dtype(k))
    centered = wide - wide.mean(1, keepdim=True)
    return (centered * (centered.square().mean(1, keepdim=True) + 1).rsqrt()).to(k.dtype)
