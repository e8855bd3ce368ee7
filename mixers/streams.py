"""The tensors that the stages of a mixer pass to each other."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from mixers.context import Rotation
from mixers.image_grid import ImageGrid
from mixers.precision import accumulation_dtype


@dataclass(frozen=True)
class Streams:
    """Everything that a mixer computes from its tokens before mixing them.

    Attributes:
        x: the tokens (b, l, d), in scan order.
        q, k: queries and keys before the feature map, (b, l, h, k).
        v: values, (b, l, h, v).
        log_decay: logarithms of the gates, ≤ 0, in a shape that the operator accepts; None without decay.
        dt: the step size Δ ≥ 0 of a state-space model, which scales the keys, (b, l, h) or (b, l, h, v); None
            elsewhere.
        beta: the step size β ≥ 0 of the delta rule, (b, l, h); None elsewhere.
        grid: (height, width) of the image; None if not given.
        rotation: of the features of q and k, in the numerator only; None: not rotated.
        visible: (b, l), False for padding, which no token sees; None: all tokens are visible.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    dt: Tensor | None = None
    beta: Tensor | None = None
    grid: ImageGrid | None = None
    rotation: Rotation | None = None
    visible: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """v in float32 at least, because unnormalized sums can exceed half precision before the norm."""
        return self.v.to(accumulation_dtype(self.v))


def with_values(streams: Streams, v: Tensor) -> Streams:
    """Return a copy of the streams with other values."""
    return replace(streams, v=v)
