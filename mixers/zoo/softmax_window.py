"""Softmax attention in a circular window of the image, CLEAR (Liu et al. 2024, 2412.16112)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from mixers.config import MixerConfig
from mixers.entries import UNBOUNDED_SUMS, register_mixer
from mixers.image_grid import ImageGrid, require_grid
from mixers.mixer import TokenMixer
from mixers.operators.sparse import window_attention, window_attention_matrix
from mixers.streams import Streams
from mixers.traits import Traits


@dataclass(frozen=True)
class SoftmaxWindowConfig(MixerConfig):
    """Options of `softmax_window`.

    Attributes:
        radius: of the window, in tokens: a token sees those at a distance below it. Published models use 8, 16 and 32.
    """

    radius: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radius < 1:
            raise ValueError(f"Expected radius ≥ 1, so that a token sees itself; got {self.radius}.")
        if self.scan != "raster":
            raise ValueError(f"The window is one of the image, in raster order, but scan={self.scan!r}.")


@register_mixer(
    "softmax_window",
    causalities=("causal", "noncausal"),
    normalizations=(True,),
    unsupported={
        "bidirectional": "a kernel without an order makes two passes the non-causal form",
        "False": UNBOUNDED_SUMS,
    },
)
class SoftmaxWindow(TokenMixer):
    """CLEAR (2412.16112): W_ij = exp(q_i·k_j/√k) for tokens nearer than `radius` in the image, rows normalized.

    The distance is Euclidean, so that the window is a circle: W is exact softmax attention inside it, and 0 outside. A
    radius beyond the diagonal of the image is softmax attention. Costs O(l·radius²) time and memory for the tiles of a
    band of rows. A causal one sees the earlier half of its window.

    Deviations from the published block: the downsampled keys and values that some of the published models add
    (down_factor 4) are left out, and so is the optional scaling of scores by the number of tokens.
    """

    Config: ClassVar[type[MixerConfig]] = SoftmaxWindowConfig
    tiny_options: ClassVar[Mapping[str, Any]] = {"radius": 2}

    config: SoftmaxWindowConfig

    def mix(self, streams: Streams) -> Tensor:
        """Compute softmax over the window, (b, l, h, v)."""
        grid = self._require_grid(streams)
        config = self.config
        return window_attention(streams.q, streams.k, streams.v, grid, config.radius, config.causality)

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """Compute W, (b, h, l, l), from its formula."""
        grid = self._require_grid(streams)
        return window_attention_matrix(streams.q, streams.k, grid, self.config.radius, self.config.causality)

    def _require_grid(self, streams: Streams) -> ImageGrid:
        return require_grid(streams.grid, streams.x.shape[1], "A window of the image")

    @property
    def permutation_equivariant(self) -> bool:
        """False: a token sees its neighbors in the image."""
        return False

    @property
    def positive(self) -> bool:
        """Exponentials are positive."""
        return True

    @property
    def traits(self) -> Traits:
        """The properties of this mixer as configured."""
        return replace(super().traits, needs_grid=True)

    def operator_state_size(self, length: int) -> int:
        """Return the numbers in the keys and values of one window, which is all that a token reads."""
        reach = self.config.radius - 1
        span = range(-reach, reach + 1)
        tokens = sum(y**2 + x**2 < self.config.radius**2 for y in span for x in span)
        return tokens * (self.key_width + self.value_width)

    def operator_flops(self, length: int) -> int:
        """Return the operations of two products per head of every token with the keys of its tile and its margin."""
        side = max(4, self.config.radius) + 2 * (self.config.radius - 1)
        return 2 * length * side**2 * (self.key_width + self.value_width)
