"""The autoencoder for images of any size: tiles in, uint8 rows on the CPU out, in little memory.

A tile is right where three things are: its convolutions see what is around it (a halo, thrown away afterwards), the
middle block's attention sees the whole image, and group norms use the whole image's mean and variance. The middle
block works on few places and runs whole; for very large images it sees its tile alone. The statistics come from an
overview, the whole image made small, or exactly: the first norm's are right whatever the others do, with it the
second's, and so on, so that one pass over all tiles a norm gives them all, and tiles then give the plain result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_adapters.highres.tiles import Canvas, Span, spans

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Tiling:
    """How an image is cut, in latent places (8 pixels of Stable Diffusion each).

    Attributes:
        tile: side of a tile's core.
        margin: halo that is thrown away; 16 covers what the convolutions see.
        blend: how far neighbors fade into each other.
        overview: side of the small image that the statistics of group norms are taken from; 0 leaves every tile its own
            (seams, and tones that differ).
        exact: take them from the tiles themselves, one pass over all of them a norm.
        whole_middle: latent places up to which the middle block runs on the whole image.
    """

    tile: int = 96
    margin: int = 16
    blend: int = 4
    overview: int = 128
    exact: bool = False
    whole_middle: int = 256 * 256

    def small(self, size: Sequence[int]) -> tuple[int, int]:
        """(height, width) of the overview of an image of `size`, of its shape and no larger than it."""
        shrink = max(1.0, max(size) / self.overview)
        return round(size[0] / shrink), round(size[1] / shrink)


@dataclass
class Tally:
    """A group norm's statistics over the cores of all tiles."""

    count: float = 0.0
    total: Any = 0.0
    square: Any = 0.0
    mean: Tensor | None = None
    variance: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """x: (groups, channels, height, width); nothing of its size is made."""
        count = x[0].numel()
        variance, mean = (part.double() for part in torch.var_mean(x.float(), dim=(1, 2, 3), correction=0))
        self.count += count
        self.total, self.square = self.total + mean * count, self.square + (variance + mean * mean) * count

    def settle(self) -> None:
        """What was gathered is what counts from now on."""
        mean = self.total / self.count
        self.mean, self.variance = mean, (self.square / self.count - mean * mean).clamp(min=0)
        self.count, self.total, self.square = 0.0, 0.0, 0.0


@dataclass
class Gauge:
    """What the norms of a network share: whether they gather, and which part of the tile is its core."""

    gathering: bool = False
    rows: Span | None = None
    columns: Span | None = None
    tallies: list[Tally] = field(default_factory=list)

    def settle(self) -> None:
        """What was gathered counts from now on."""
        self.gathering = False
        for tally in self.tallies:
            tally.settle()


class TileNorm(nn.GroupNorm):
    """A group norm that uses the statistics of the whole image on a tile of it, and helps to gather them."""

    gauge: Gauge
    tally: Tally

    def forward(self, x: Tensor) -> Tensor:
        """(1, c, h, w) -> (1, c, h, w)."""
        if self.gauge.gathering:
            self.tally.add(self._core(x).unflatten(0, (self.num_groups, -1)))
        mean, variance = self.tally.mean, self.tally.variance
        if mean is None or variance is None:
            return super().forward(x)
        rates = (variance + self.eps).rsqrt()
        each = x.shape[1] // self.num_groups
        scale = rates.repeat_interleave(each) * self.weight.to(rates.dtype)
        shift = self.bias.to(rates.dtype) - mean.repeat_interleave(each) * scale
        shape = (1, -1, *(1,) * (x.ndim - 2))
        return torch.addcmul(shift.to(x.dtype).view(shape), x, scale.to(x.dtype).view(shape))

    def _core(self, x: Tensor) -> Tensor:
        rows, columns = self.gauge.rows, self.gauge.columns
        assert rows is not None and columns is not None
        if x.ndim == 3:  # attention normalizes (1, c, places)
            x = x.unflatten(-1, (rows.stop - rows.start, columns.stop - columns.start))
        down, across = x.shape[-2] / (rows.stop - rows.start), x.shape[-1] / (columns.stop - columns.start)
        top, bottom = (round((place - rows.start) * down) for place in rows.core)
        left, right = (round((place - columns.start) * across) for place in columns.core)
        return x[0, :, top:bottom, left:right]


@contextmanager
def shared_norms(parts: Sequence[nn.Module]) -> Iterator[Gauge]:
    """Make the group norms of `parts` share statistics inside; gives the gauge that steers them."""
    norms = [m for part in parts for m in part.modules() if type(m) is nn.GroupNorm]
    gauge = Gauge(tallies=[Tally() for _ in norms])
    try:
        for norm, tally in zip(norms, gauge.tallies, strict=True):
            norm.__class__ = TileNorm
            norm.gauge, norm.tally = gauge, tally  # type: ignore[assignment]
        yield gauge
    finally:
        for norm in norms:
            norm.__class__ = nn.GroupNorm
            norm.__dict__.pop("gauge", None)
            norm.__dict__.pop("tally", None)


@torch.no_grad()
def decode(vae: Any, latents: Tensor, tiling: Tiling | None = None, report: Report | None = None) -> Tensor:
    """Scaled latents (1, c, h, w) -> the image (height, width, 3), uint8, on the CPU.

    Time: that of a plain decoding and the halos; exact, once more for every group norm. Memory: one tile's, the
    overview's and the image.

    Raises:
        FloatingPointError: latents or pixels that are not finite.
    """
    if not latents.isfinite().all():
        raise FloatingPointError(
            f"Cannot decode latents that are not finite ({latents.dtype}): the denoising went wrong before. Try "
            "bfloat16 or float32, or a mixer that is normalized."
        )
    tiling, decoder = tiling or Tiling(), vae.decoder
    middle = _Sequence(vae.post_quant_conv, decoder.conv_in, decoder.mid_block)
    rear = _Sequence(*decoder.up_blocks, decoder.conv_norm_out, decoder.conv_act, decoder.conv_out)
    z = _unscaled(vae, latents)
    whole = z.shape[-2] * z.shape[-1] <= tiling.whole_middle
    source, network = (middle(z), rear) if whole else (z, _Sequence(middle, rear))
    factor = _factor(vae)
    canvas = Canvas(z.shape[-2] * factor, z.shape[-1] * factor)
    work = _Work(network, lambda row, column: source[..., row.start : row.stop, column.start : column.stop], tiling)
    with work.statistics(lambda size: F.interpolate(source, size=size, mode="nearest"), z.shape[-2:]):
        for row, column, tile in work.tiles(report):
            _place(canvas, tile, row, column, factor)
            del tile  # or it is there while the next is made
            if column is work.columns[-1]:
                canvas.finish((row.core[1] - row.blend[1]) * factor)
    return canvas.pixels


@torch.no_grad()
def encode(vae: Any, image: Tensor, tiling: Tiling | None = None, report: Report | None = None) -> Tensor:
    """An image (height, width, 3), uint8, on the CPU -> scaled latents (1, c, h, w), the posterior's means."""
    tiling, encoder, factor = tiling or Tiling(), vae.encoder, _factor(vae)
    parameter = next(vae.parameters())
    front = _Sequence(encoder.conv_in, *encoder.down_blocks)
    middle = _Sequence(encoder.mid_block, encoder.conv_norm_out, encoder.conv_act, encoder.conv_out, vae.quant_conv)
    size = (image.shape[0] // factor, image.shape[1] // factor)
    whole = size[0] * size[1] <= tiling.whole_middle

    def pixels(row: Span, column: Span) -> Tensor:
        top, bottom, left, right = (n * factor for n in (row.start, row.stop, column.start, column.stop))
        return (image[top:bottom, left:right].to(parameter) / 127.5 - 1).permute(2, 0, 1)[None]

    def small(places: tuple[int, int]) -> Tensor:
        strides = [max(1, side // place) for side, place in zip(size, places, strict=True)]
        picked = image[:: strides[0], :: strides[1]][: places[0] * factor, : places[1] * factor]
        return (picked.to(parameter) / 127.5 - 1).permute(2, 0, 1)[None]

    work = _Work(front if whole else _Sequence(front, middle), pixels, tiling)
    found: Tensor | None = None
    with work.statistics(small, size):
        for row, column, tile in work.tiles(report):
            if found is None:
                found = tile.new_empty(1, tile.shape[1], *size)
            kept = tile[..., row.core[0] - row.start : row.core[1] - row.start, :]
            found[..., row.core[0] : row.core[1], column.core[0] : column.core[1]] = kept[
                ..., column.core[0] - column.start : column.core[1] - column.start
            ]
    assert found is not None
    moments = middle(found) if whole else found
    return _scaled(vae, moments.chunk(2, dim=1)[0])


@torch.no_grad()
def rehearse(vae: Any, latents: Tensor, tiling: Tiling) -> Tensor:
    """What of `decode` needs the most memory, for fake tensors: the middle, the overview and the largest tile."""
    decoder, z = vae.decoder, _unscaled(vae, latents)
    middle = _Sequence(vae.post_quant_conv, decoder.conv_in, decoder.mid_block)
    rear = _Sequence(*decoder.up_blocks, decoder.conv_norm_out, decoder.conv_act, decoder.conv_out)
    whole = z.shape[-2] * z.shape[-1] <= tiling.whole_middle
    source, network = (middle(z), rear) if whole else (z, _Sequence(middle, rear))
    rows, columns = (spans(side, tiling.tile, tiling.margin, tiling.blend) for side in z.shape[-2:])
    row, column = (max(axis, key=lambda span: span.stop - span.start) for axis in (rows, columns))
    if tiling.overview and len(rows) * len(columns) > 1:
        height, width = tiling.small(z.shape[-2:])
        network(source[..., :height, :width])
    tile: Tensor = network(source[..., row.start : row.stop, column.start : column.stop])
    return tile


class _Work:
    """A network over the tiles of an image, with statistics of the whole of it.

    Attributes:
        rows, columns: where the tiles lie; set when the size is known.
    """

    def __init__(self, network: nn.Module, source: Callable[[Span, Span], Tensor], tiling: Tiling) -> None:
        self.network, self.source, self.tiling = network, source, tiling
        self.rows: list[Span] = []
        self.columns: list[Span] = []

    @contextmanager
    def statistics(self, small: Callable[[tuple[int, int]], Tensor], size: Sequence[int]) -> Iterator[None]:
        """The group norms know the whole image inside; `small` gives the input of an image of some size."""
        cut = self.tiling
        self.rows, self.columns = (spans(side, cut.tile, cut.margin, cut.blend) for side in size)
        alone = len(self.rows) == len(self.columns) == 1
        with shared_norms([] if alone else [self.network]) as gauge:
            if cut.exact:
                for _ in gauge.tallies:
                    gauge.gathering = True
                    for row, column in product(self.rows, self.columns):
                        gauge.rows, gauge.columns = row, column
                        self.network(self.source(row, column))
                    gauge.settle()
            elif cut.overview and gauge.tallies:
                places = cut.small(size)
                gauge.gathering = True
                gauge.rows, gauge.columns = (Span(0, n, (0, n), (0, 0)) for n in places)
                self.network(small(places))
                gauge.settle()
            yield

    def tiles(self, report: Report | None) -> Iterator[tuple[Span, Span, Tensor]]:
        """Every tile's place and what the network makes of it, row by row."""
        places = list(product(self.rows, self.columns))
        for number, (row, column) in enumerate(places):
            yield row, column, self.network(self.source(row, column))
            if report is not None:
                report(number + 1, len(places))


def _place(canvas: Canvas, tile: Tensor, row: Span, column: Span, factor: int) -> None:
    if not tile.isfinite().all():
        raise FloatingPointError(
            f"The autoencoder gave pixels that are not finite in {tile.dtype}; that of SDXL overflows in float16. Give "
            "it more: pipe.vae.to(torch.float32)."
        )
    rows, columns = row.weights(factor), column.weights(factor)
    top, left = row.start * factor, column.start * factor
    kept = tile[0, :, rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]
    canvas.add(kept.float().cpu(), rows, columns)


def _factor(vae: Any) -> int:
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _unscaled(vae: Any, latents: Tensor) -> Tensor:
    mean, std = _moments(vae, latents)
    return (latents / vae.config.scaling_factor * std + mean).to(next(vae.parameters()).dtype)


def _scaled(vae: Any, latents: Tensor) -> Tensor:
    mean, std = _moments(vae, latents)
    return (latents - mean) / std * vae.config.scaling_factor


def _moments(vae: Any, like: Tensor) -> tuple[Any, Any]:
    """What some autoencoders' latents are standardized by; 0 and 1 of most."""
    given = vae.config.latents_mean, vae.config.latents_std
    if None in given:
        return 0.0, 1.0
    mean, std = (torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1) for values in given)
    return mean, std


class _Sequence(nn.Sequential):
    """Modules one after the other; those that a model lacks (None) are left out."""

    def __init__(self, *modules: nn.Module | None) -> None:
        super().__init__(*(module for module in modules if module is not None))
