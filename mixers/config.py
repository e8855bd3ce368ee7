"""The options that every mixer has."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from mixers.context import ROTARY_PLACEMENTS, TEXT_ATTENTIONS, RotaryPlacement, TextAttention
from mixers.option_types import check_option_types
from mixers.stages.normalizers import NORMALIZER_NAMES, NormalizerName
from mixers.stages.scan_orders import SCANS
from mixers.suggest import unknown_name
from mixers.traits import Causality


@dataclass(frozen=True)
class MixerConfig:
    """Base of every mixer's configuration; frozen, and serializable as JSON.

    Each part of a mixer is an independent option, so that an ablation can remove it, or add it to any mixer. A mixer's
    own configuration overrides the defaults with those of its paper.

    Attributes:
        causality: which tokens each token sees.
        normalize: normalize the rows of the mixing matrix.
        normalizer: how: `row_sum` divides each row by its sum, `subtract` subtracts the mean score and adds one over
            the number of tokens, `decoupled` divides signed weights by sums of positive ones
            (`mixers.stages.normalizers`). None: the paper's.
        scan: order in which the tokens of an image are read, a key of `SCANS`: `raster`, `column`, `cross` (raster
            and column, averaged), `zigzag` or `hilbert`. For mixers whose result depends on the order.
        expand: width of the values divided by the model width. Other than 1, the mixer needs its own projections.
        conv_size: window, in tokens, of a depthwise convolution with SiLU on q, k and v; 0: none. The window of a
            causal mixer ends at the current token, otherwise it is centered.
        conv_2d: that window is conv_size × conv_size latent pixels of the image. None: the paper's default; False for
            causal mixers and for scans other than raster, whose windows it does not fit.
        conv_bias: whether that convolution has a bias.
        local_conv_size: side, in latent pixels, of a depthwise convolution of the values over the image, which is
            added to the result; 0: none. None: the paper's default; 0 for causal mixers, because the convolution
            would leak future tokens.
        skip: add D · v to the result, with one D per head.
        norm: normalize the result per token, by RMSNorm or the norm of the paper.
        gate: multiply the result by SiLU(to_gate(x)).
        output_gain: multiply the result of every head by a constant, the buffer `output_gain` (h,), initially ones. It
            is not trained; set it once to bring a new mixer to the scale of the one that it replaces.
        text: how image tokens see the text tokens of a host's joint attention; None: there is no text. `softmax`:
            softmax attention to the text beside the mixer among image tokens (the split of EDiT, 2503.16726), each
            weighted by its number of tokens, with a learned bias per head. `shared`: both under one denominator, as in
            Attention Surgery (2509.24899). `linear`: text tokens are keys of the mixer, without order and decay.
        rope: where a host's rotary embedding acts; None: it has none. `after_map`: on the features of q and k, in the
            numerator only. `before_map`: on q and k, an ablation.
    """

    default_local_conv_size: ClassVar[int] = 0
    default_conv_2d: ClassVar[bool] = False
    default_normalizer: ClassVar[NormalizerName] = "row_sum"

    causality: Causality = "noncausal"
    normalize: bool = True
    normalizer: NormalizerName | None = None
    scan: str = "raster"
    expand: float = 1
    conv_size: int = 0
    conv_2d: bool | None = None
    conv_bias: bool = True
    local_conv_size: int | None = None
    skip: bool = False
    norm: bool = False
    gate: bool = False
    output_gain: bool = False
    text: TextAttention | None = None
    rope: RotaryPlacement | None = None

    def __post_init__(self) -> None:
        check_option_types(self)
        if self.local_conv_size is None:
            size = 0 if self.causality == "causal" else self.default_local_conv_size
            object.__setattr__(self, "local_conv_size", size)
        if self.conv_2d is None:
            conv_2d = self.default_conv_2d and self.causality != "causal" and self.scan == "raster"
            object.__setattr__(self, "conv_2d", conv_2d and self.conv_size > 0)
        for option, value, names in (
            ("normalizer", self.normalizer, (None, *NORMALIZER_NAMES)),
            ("scan", self.scan, SCANS),
            ("text", self.text, (None, *TEXT_ATTENTIONS)),
            ("rope", self.rope, (None, *ROTARY_PLACEMENTS)),
        ):
            if value not in names:
                raise ValueError(unknown_name(option, str(value), [name for name in names if name]))
        if self.conv_2d and not self.conv_size:
            raise ValueError(
                "conv_2d=True needs a convolution: pass conv_size, the side of its window, or leave conv_2d out."
            )
        if self.normalizer is not None and not self.normalize:
            raise ValueError(f"normalizer={self.normalizer!r} needs normalize=True.")
        if self.expand <= 0 or self.conv_size < 0 or (self.local_conv_size or 0) < 0:
            raise ValueError(
                f"Expected expand > 0, conv_size ≥ 0 and local_conv_size ≥ 0, got {self.expand}, {self.conv_size} "
                f"and {self.local_conv_size}."
            )

    @property
    def row_normalizer(self) -> NormalizerName | None:
        """The normalizer in effect; None if rows are not normalized."""
        return (self.normalizer or self.default_normalizer) if self.normalize else None

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        return asdict(self)
