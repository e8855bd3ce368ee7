"""The projections of an attention layer as a mixer calls them: with the layer's norms of queries and keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class LayerProjections:
    """The projections of an attention layer, with its norms of queries and keys per head (Stable Diffusion 3.5, Flux).

    Mixers get this and not the layer: accelerate's hooks move every argument that has a method `to`.

    Attributes:
        to_v: the layer's own.
        to_out: the layer's own; of a layer without an output projection, no layers.
    """

    def __init__(self, attn: Any) -> None:
        self._attn = attn
        self.to_v = attn.to_v
        self.to_out = getattr(attn, "to_out", ())

    def to_q(self, tokens: Tensor) -> Tensor:
        """Tokens (b, l, d) -> queries (b, l, h·k)."""
        return norm_heads(self._attn.to_q(tokens), self._attn.norm_q, self._attn.heads)

    def to_k(self, tokens: Tensor) -> Tensor:
        """Tokens (b, l, d) -> keys (b, l, h·k)."""
        return norm_heads(self._attn.to_k(tokens), self._attn.norm_k, self._attn.heads)


class KnownProjections:
    """Projections whose queries, keys and values of some tokens are known: they are not computed again.

    Args:
        projections: of the layer.
        tokens: (b, l, d); other tensors are projected as usual.

    Attributes:
        q, k, v: of `tokens`, (b, l, h·c).
        to_out: the layer's own.
    """

    def __init__(self, projections: LayerProjections, tokens: Tensor) -> None:
        self._projections = projections
        self._tokens = tokens
        self.q = projections.to_q(tokens)
        self.k = projections.to_k(tokens)
        self.v: Tensor = projections.to_v(tokens)
        self.to_out = projections.to_out

    def to_q(self, tokens: Tensor) -> Tensor:
        """Tokens (b, l, d) -> queries (b, l, h·k)."""
        return self.q if tokens is self._tokens else self._projections.to_q(tokens)

    def to_k(self, tokens: Tensor) -> Tensor:
        """Tokens (b, l, d) -> keys (b, l, h·k)."""
        return self.k if tokens is self._tokens else self._projections.to_k(tokens)

    def to_v(self, tokens: Tensor) -> Tensor:
        """Tokens (b, l, d) -> values (b, l, h·v)."""
        result: Tensor = self.v if tokens is self._tokens else self._projections.to_v(tokens)
        return result


def norm_heads(x: Tensor, norm: nn.Module | None, heads: int) -> Tensor:
    """Apply a norm to every head of (b, l, h·c); None: no norm."""
    return x if norm is None else norm(x.unflatten(-1, (heads, -1))).flatten(-2)
