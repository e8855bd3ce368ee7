"""Tokens, copies and references that the checks share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixers.mixer import TokenMixer
from mixers.stages.projections import apply_to_out
from mixers.stages.scan_orders import inverse_permutation
from mixers.streams import Streams


@dataclass(frozen=True)
class Inputs:
    """What a check feeds a mixer: normal tokens of these lengths, the shortest first, so that a failure is small.

    Attributes:
        lengths: numbers of tokens.
        batch: items.
        seed: of the generator.
        device: of an operator's tensors; a mixer's tokens are where the mixer is.
    """

    lengths: tuple[int, ...] = (1, 2, 3, 19, 64, 65)
    batch: int = 2
    seed: int = 0
    device: str = "cpu"

    def at_least(self, fewest: int) -> list[int]:
        """The lengths from `fewest` on; `fewest` itself where all are shorter."""
        return sorted({max(length, fewest) for length in self.lengths if length >= fewest} or {fewest})

    def tokens(self, mixer: TokenMixer, length: int, batch: int | None = None, stream: int = 0) -> Tensor:
        """Normal tokens (b, l, d) in the mixer's dtype; another `stream` gives independent ones."""
        generator = torch.Generator().manual_seed(self.seed + stream * 2**32)
        shape = (batch or self.batch, length, mixer.dim)
        parameter = next(mixer.parameters())
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(parameter)

    def streams(self, mixer: TokenMixer, length: int) -> Streams:
        """What the mixer's operator gets for such tokens, in the first of its scan orders."""
        x, grid = self.tokens(mixer, length), grid_of(mixer, length)
        order = mixer.scan_orders(x, grid)[0]
        return mixer.compute_streams(x if order is None else x[:, order], mixer.resolve_projections(None), grid)


def grid_of(mixer: TokenMixer, length: int) -> tuple[int, int] | None:
    """The squarest (height, width) of `length` places, for a mixer that needs one."""
    if not mixer.traits.needs_grid:
        return None
    height = max(n for n in range(1, int(length**0.5) + 1) if length % n == 0)
    return height, length // height


def run(mixer: TokenMixer, x: Tensor, projections: Any = None) -> Tensor:
    """mixer(x), told the grid where it needs one."""
    return mixer(x, grid=grid_of(mixer, x.shape[1]), projections=projections)


def through_its_matrix(mixer: TokenMixer, x: Tensor) -> Tensor:
    """mixer(x) by another road: the matrix from the formula, written out, applied to the values. O(l²)."""
    host, results, grid = mixer.resolve_projections(None), [], grid_of(mixer, x.shape[1])
    for order in mixer.scan_orders(x, grid):
        streams = mixer.compute_streams(x if order is None else x[:, order], host, grid)
        y = mixer.output(apply_matrix(mixer.mixing_matrix(streams), streams.v), streams)
        results.append(y if order is None else y[:, inverse_permutation(order)])
    y = torch.stack(results).mean(0)
    return apply_to_out(host.to_out, y.flatten(2))


def apply_matrix(weights: Tensor, v: Tensor) -> Tensor:
    """(b, h, l, l) or (b, h, v, l, l), times values (b, l, h, v)."""
    axes = "bhij,bjhv->bihv" if weights.ndim == 4 else "bhvij,bjhv->bihv"
    return torch.einsum(axes, weights, v.to(weights.dtype))


def rebuilt(mixer: TokenMixer, config: Any = None, own_projections: bool = True) -> TokenMixer:
    """A new mixer of the same class with the same parameters, its configuration replaced where one is given."""
    fresh = type(mixer)(config or mixer.config, mixer.dim, mixer.heads, own_projections=own_projections).double()
    kept = {n: p for n, p in mixer.state_dict().items() if own_projections or not n.startswith("projections.")}
    fresh.load_state_dict(kept)
    return fresh.train(mixer.training)


def has_option(mixer: TokenMixer, name: str) -> bool:
    """Whether its configuration has a field of that name."""
    return name in {f.name for f in dataclasses.fields(mixer.config)}


def with_option(mixer: TokenMixer, **options: Any) -> TokenMixer:
    """A copy with other options."""
    return rebuilt(mixer, dataclasses.replace(mixer.config, **options))


def without_eps(mixer: TokenMixer) -> TokenMixer:
    """The mixer with an eps that is nothing beside any weight, or itself where its configuration has none."""
    return with_option(mixer, eps=1e-200) if has_option(mixer, "eps") else mixer
