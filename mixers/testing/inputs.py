"""Tokens, modified mixers and reference results that the checks share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixers.mixer import TokenMixer
from mixers.operators import blockwise
from mixers.stages.projections import apply_to_out
from mixers.stages.scan_orders import inverse_permutation
from mixers.streams import Streams


@dataclass(frozen=True)
class CheckInputs:
    """The inputs of a check: normal tokens in sequences of these lengths, the shortest first, for small failures.

    Attributes:
        lengths: numbers of tokens.
        batch: batch size.
        seed: of the generator.
        device: of an operator's tensors; a mixer's tokens are where the mixer is.
    """

    lengths: tuple[int, ...] = (1, 2, 3, 19, 64, 65)
    batch: int = 2
    seed: int = 0
    device: str = "cpu"

    def at_least(self, fewest: int) -> list[int]:
        """Return the lengths from `fewest` on; `fewest` itself if all are shorter."""
        return sorted({length for length in self.lengths if length >= fewest} or {fewest})

    def tokens(self, mixer: TokenMixer, length: int, batch: int | None = None, stream: int = 0) -> Tensor:
        """Return normal tokens (b, l, d) in the mixer's dtype; another `stream` gives independent ones."""
        generator = torch.Generator().manual_seed(self.seed + stream * 2**32)
        shape = (batch or self.batch, length, mixer.dim)
        parameter = next(mixer.parameters())
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(parameter)

    def streams(self, mixer: TokenMixer, length: int, batch: int | None = None) -> Streams:
        """Return what the mixer's operator gets for such tokens, in the first of its scan orders."""
        x = self.tokens(mixer, length, batch)
        grid = grid_of(mixer, length)
        order = mixer.scan_orders(x, grid)[0]
        return mixer.compute_streams(x if order is None else x[:, order], mixer.resolve_projections(None), grid)


def grid_of(mixer: TokenMixer, length: int) -> tuple[int, int] | None:
    """Return the most square (height, width) with `length` tokens, for a mixer that needs a grid; otherwise None."""
    if not mixer.traits.needs_grid:
        return None
    height = max(n for n in range(1, int(length**0.5) + 1) if length % n == 0)
    return height, length // height


def run_mixer(mixer: TokenMixer, x: Tensor, projections: Any = None) -> Tensor:
    """Return mixer(x), with a grid if it needs one."""
    return mixer(x, grid=grid_of(mixer, x.shape[1]), projections=projections)


def apply_through_matrix(mixer: TokenMixer, x: Tensor) -> Tensor:
    """Return mixer(x), computed independently: the matrix from the formula, applied to the values. O(l²)."""
    host = mixer.resolve_projections(None)
    grid = grid_of(mixer, x.shape[1])
    results = []
    for order in mixer.scan_orders(x, grid):
        streams = mixer.compute_streams(x if order is None else x[:, order], host, grid)
        y = mixer.finish(apply_matrix(mixer.mixing_matrix(streams), streams.v), streams)
        results.append(y if order is None else y[:, inverse_permutation(order)])
    y = torch.stack(results).mean(0)
    return apply_to_out(host.to_out, y.flatten(2))


def apply_matrix(matrix: Tensor, v: Tensor) -> Tensor:
    """Multiply a matrix (b, h, l, l) or (b, h, v, l, l) by values (b, l, h, v)."""
    axes = "bhij,bjhv->bihv" if matrix.ndim == 4 else "bhvij,bjhv->bihv"
    return torch.einsum(axes, matrix, v.to(matrix.dtype))


def slice_tokens(streams: Streams, start: int, stop: int) -> Streams:
    """Return the streams of consecutive tokens, without a grid; tensors that have no axis of tokens stay whole."""
    length = streams.x.shape[1]
    parts: dict[str, Any] = {
        name: value[:, start:stop]
        for name, value in vars(streams).items()
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == length
    }
    return dataclasses.replace(streams, **parts, grid=None)


def flip_tokens(streams: Streams) -> Streams:
    """Return the streams of the tokens in reversed order; tensors without an axis of tokens stay as they are."""
    length = streams.x.shape[1]
    flipped: dict[str, Any] = {
        name: value.flip(1)
        for name, value in vars(streams).items()
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == length
    }
    return dataclasses.replace(streams, **flipped)


def rebuild(mixer: TokenMixer, config: Any = None, own_projections: bool = True) -> TokenMixer:
    """Return a new mixer of the same class with the same parameters, and with another configuration if one is given."""
    fresh = type(mixer)(config or mixer.config, mixer.dim, mixer.heads, own_projections=own_projections).double()
    state = {n: p for n, p in mixer.state_dict().items() if own_projections or not n.startswith("projections.")}
    fresh.load_state_dict(state)
    return fresh.train(mixer.training)


def has_option(mixer: TokenMixer, name: str) -> bool:
    """Return whether the mixer's configuration has a field of that name."""
    return name in {f.name for f in dataclasses.fields(mixer.config)}


def with_option(mixer: TokenMixer, **options: Any) -> TokenMixer:
    """Return a copy with other options."""
    return rebuild(mixer, dataclasses.replace(mixer.config, **options))


def with_norm(mixer: TokenMixer) -> TokenMixer:
    """Return the mixer with a norm in its output stage, or itself if it has one."""
    if mixer.config.norm:
        return mixer
    config = dataclasses.replace(mixer.config, norm=True)
    normed = type(mixer)(config, mixer.dim, mixer.heads, own_projections=mixer.projections is not None).double()
    normed.load_state_dict(mixer.state_dict(), strict=False)
    return normed.train(mixer.training)


def without_eps(mixer: TokenMixer) -> TokenMixer:
    """Return the mixer with a negligible eps, or itself if its configuration has none."""
    return with_option(mixer, eps=1e-200) if has_option(mixer, "eps") else mixer


def as_causal(mixer: TokenMixer) -> TokenMixer | None:
    """Return the causal form of a mixer with the same parameters, or None if that form is refused or has others."""
    options: dict[str, Any] = {"causality": "causal"}
    if has_option(mixer, "local_conv_size"):
        options["local_conv_size"] = 0
    try:
        causal = type(mixer)(dataclasses.replace(mixer.config, **options), mixer.dim, mixer.heads).double()
    except ValueError:
        return None
    state = {n: p for n, p in mixer.state_dict().items() if not n.startswith("output.local")}
    shapes = {name: p.shape for name, p in state.items()}
    if {name: p.shape for name, p in causal.state_dict().items()} != shapes:
        return None
    causal.load_state_dict(state)
    return causal


@contextmanager
def small_blocks(elements: int = 1) -> Iterator[None]:
    """Let CPU backends split sequences into blocks of this many elements, so that short sequences have several."""
    usual = blockwise.BLOCK_ELEMENTS
    blockwise.BLOCK_ELEMENTS = elements
    try:
        yield
    finally:
        blockwise.BLOCK_ELEMENTS = usual
