"""What an attention layer of a host may have beside its tokens: rotary embeddings, padding, and text.

A mixer gets it as `forward(x, context=...)`. Queries of the text are the host's own business: there are few of them, so
they stay softmax attention over everything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from mixers.precision import accumulation_dtype

TextAttention = Literal["softmax", "shared", "linear"]
"""How image tokens see the text; see `MixerConfig.text`."""

RotaryPlacement = Literal["after_map", "before_map"]
"""Where a host's rotary embedding acts; see `MixerConfig.rope`."""

TEXT_ATTENTIONS: tuple[TextAttention, ...] = get_args(TextAttention)
ROTARY_PLACEMENTS: tuple[RotaryPlacement, ...] = get_args(RotaryPlacement)


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding as diffusers computes it: channels 2i and 2i + 1 of every head rotate together.

    Attributes:
        cos, sin: (l, k), each pair's number twice.
    """

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate queries, keys or features (b, l, h, k).

        Raises:
            ValueError: k or l is not that of the embedding.
        """
        if x.shape[-1] != self.cos.shape[-1] or x.shape[1] != len(self.cos):
            raise ValueError(
                f"Cannot rotate {x.shape[1]} tokens of {x.shape[-1]} channels per head: the host's rotary embedding "
                f"has {len(self.cos)} tokens of {self.cos.shape[-1]} channels."
            )
        dtype = accumulation_dtype(x)
        wide = x.to(dtype)
        real, imaginary = wide.unflatten(-1, (-1, 2)).unbind(-1)
        quarter_turn = torch.stack([-imaginary, real], dim=-1).flatten(-2)
        return (wide * self.cos[:, None].to(dtype) + quarter_turn * self.sin[:, None].to(dtype)).to(x.dtype)

    def __getitem__(self, tokens: slice | Tensor) -> Rotation:
        """Return the embedding of some of the tokens."""
        return Rotation(self.cos[tokens], self.sin[tokens])


@dataclass(frozen=True)
class TextTokens:
    """The text that image tokens see, projected and normed by the host.

    Attributes:
        q: queries of the image tokens for softmax attention, rotated, (b, l, h, k).
        k, v: of the text tokens, before any rotation, (b, t, h, k) and (b, t, h, v).
        rotation: of the text tokens; None: not rotated.
        visible: (b, t), False for padding; None: all are visible.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rotation: Rotation | None = None
    visible: Tensor | None = None

    @property
    def rotated_k(self) -> Tensor:
        """The keys as softmax attention reads them, (b, t, h, k)."""
        return self.k if self.rotation is None else self.rotation(self.k)

    @property
    def count(self) -> Tensor | int:
        """Number of visible text tokens: t, or (b, 1, 1, 1) with padding."""
        return count_tokens(self.k, self.visible)


@dataclass(frozen=True)
class MixingContext:
    """What a host's layer has beside image tokens x (b, l, d).

    Attributes:
        text: None: the layer mixes image tokens alone.
        rotation: of the image tokens, in raster order; None: not rotated.
        visible: (b, l), False for padding, which no token sees; None: all tokens are visible.
    """

    text: TextTokens | None = None
    rotation: Rotation | None = None
    visible: Tensor | None = None

    def reorder(self, order: Tensor | None) -> MixingContext:
        """Return the context of tokens x[:, order]."""
        if order is None:
            return self
        return MixingContext(
            text=None if self.text is None else replace(self.text, q=self.text.q[:, order]),
            rotation=None if self.rotation is None else self.rotation[order],
            visible=None if self.visible is None else self.visible[:, order],
        )


def count_tokens(tokens: Tensor, visible: Tensor | None) -> Tensor | int:
    """Count visible tokens: the length of axis 1, or of each sample (b, 1, 1, 1) with padding."""
    if visible is None:
        return tokens.shape[1]
    return visible.sum(1).to(accumulation_dtype(tokens))[:, None, None, None]


def join_visible(
    first: Tensor, first_visible: Tensor | None, second: Tensor, second_visible: Tensor | None
) -> Tensor | None:
    """Concatenate the masks (b, ·) of two sequences of tokens (b, ·, …); None if all tokens are visible."""
    if first_visible is None and second_visible is None:
        return None
    parts = []
    for tokens, visible in ((first, first_visible), (second, second_visible)):
        everything = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        parts.append(everything if visible is None else visible)
    return torch.cat(parts, dim=1)
