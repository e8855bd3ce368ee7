"""The autoencoder for images of any size: it decodes and encodes in tiles, in little memory.

A tile equals the same region of the whole image if three conditions hold: its convolutions see what surrounds it (a
halo, which is discarded), the middle block's attention sees the whole image, and group norms use the whole image's
mean and variance.

The middle block works on few latent pixels and runs on the whole image; for very large images it sees one tile. The
statistics of the group norms come from a downscaled overview of the image. They can also be exact: the input of the
first norm does not depend on other norms, so one pass over all tiles measures it; that makes the input of the second
norm exact, and so on, one pass per norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_adapters.highres.progress import StepCallback
from unet_adapters.highres.tile_statistics import tiled_group_norms
from unet_adapters.highres.tiles import ImageCanvas, TileSpan, split_into_tiles


@dataclass(frozen=True)
class Tiling:
    """How an image is split, in latent pixels (8 image pixels each for Stable Diffusion).

    Attributes:
        tile: side of a tile's core.
        margin: width of the discarded halo; 16 covers the receptive field of the decoder's convolutions.
        blend: how far neighboring tiles fade into each other.
        overview: side of the downscaled image that the statistics of group norms are taken from; 0: every tile uses
            its own statistics, which leaves seams and different tones.
        exact: measure the statistics on the tiles themselves, one pass over all tiles per norm.
        whole_middle: largest number of latent pixels for which the middle block runs on the whole image.
    """

    tile: int = 96
    margin: int = 16
    blend: int = 4
    overview: int = 128
    exact: bool = False
    whole_middle: int = 256 * 256

    def overview_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Return (height, width) of the overview of an image of `size`, of the same shape and not larger."""
        shrink = max(1.0, max(size) / self.overview)
        return round(size[0] / shrink), round(size[1] / shrink)

    def spans(self, total: int) -> list[TileSpan]:
        """Split an axis of `total` latent pixels."""
        return split_into_tiles(total, self.tile, self.margin, self.blend)


@torch.no_grad()
def decode_tiled(
    vae: Any, latents: Tensor, tiling: Tiling | None = None, progress: StepCallback | None = None
) -> Tensor:
    """Decode scaled latents (1, c, h, w) to an image (height, width, 3) of uint8 on the CPU.

    Time: that of a plain decoding plus the halos; with exact statistics, once more per group norm. Memory: that of one
    tile, of the overview, and the image.

    Raises:
        FloatingPointError: If latents or pixels are not finite.
    """
    if not latents.isfinite().all():
        raise FloatingPointError(
            f"Cannot decode latents that are not finite ({latents.dtype}): the denoising diverged. Use bfloat16 or "
            "float32, or a mixer with normalize=True."
        )
    tiling = tiling or Tiling()
    source, network = _decoder_parts(vae, _unscale(vae, latents), tiling)
    height, width = source.shape[-2:]
    factor = scale_factor(vae)
    canvas = ImageCanvas(height * factor, width * factor)

    def crop(row: TileSpan, column: TileSpan) -> Tensor:
        return source[..., row.start : row.stop, column.start : column.stop]

    tiled = _TiledNetwork(network, crop, tiling, (height, width))
    with tiled.shared_statistics(lambda size: F.interpolate(source, size=size, mode="nearest")):
        for row, column, tile in tiled.run(progress):
            _add_tile(canvas, tile, row, column, factor)
            del tile  # otherwise it stays alive while the next one is computed
            if column is tiled.columns[-1]:
                canvas.complete_rows((row.core[1] - row.blend[1]) * factor)
    return canvas.pixels


@torch.no_grad()
def encode_tiled(vae: Any, image: Tensor, tiling: Tiling | None = None, progress: StepCallback | None = None) -> Tensor:
    """Encode an image (height, width, 3) of uint8 on the CPU to scaled latents (1, c, h, w), the posterior's mean."""
    tiling = tiling or Tiling()
    encoder = vae.encoder
    factor = scale_factor(vae)
    parameter = next(vae.parameters())
    front = _Sequence(encoder.conv_in, *encoder.down_blocks)
    middle = _Sequence(encoder.mid_block, encoder.conv_norm_out, encoder.conv_act, encoder.conv_out, vae.quant_conv)
    size = (image.shape[0] // factor, image.shape[1] // factor)
    whole_middle = size[0] * size[1] <= tiling.whole_middle

    def to_input(pixels: Tensor) -> Tensor:
        return (pixels.to(parameter) / 127.5 - 1).permute(2, 0, 1)[None]

    def crop(row: TileSpan, column: TileSpan) -> Tensor:
        rows = slice(row.start * factor, row.stop * factor)
        columns = slice(column.start * factor, column.stop * factor)
        return to_input(image[rows, columns])

    def overview(latent_size: tuple[int, int]) -> Tensor:
        rows, columns = (
            torch.arange(small * factor) * side // small for side, small in zip(size, latent_size, strict=True)
        )
        return to_input(image[rows][:, columns])

    tiled = _TiledNetwork(front if whole_middle else _Sequence(front, middle), crop, tiling, size)
    features: Tensor | None = None
    with tiled.shared_statistics(overview):
        for row, column, tile in tiled.run(progress):
            if features is None:
                features = tile.new_empty(1, tile.shape[1], *size)
            rows = slice(row.core[0] - row.start, row.core[1] - row.start)
            columns = slice(column.core[0] - column.start, column.core[1] - column.start)
            features[..., slice(*row.core), slice(*column.core)] = tile[..., rows, columns]
    assert features is not None
    moments = middle(features) if whole_middle else features
    return _scale(vae, moments.chunk(2, dim=1)[0])


@torch.no_grad()
def decode_largest_tile(vae: Any, latents: Tensor, tiling: Tiling) -> Tensor:
    """Run the parts of `decode_tiled` that need the most memory, to count it: middle, overview and largest tile."""
    source, network = _decoder_parts(vae, _unscale(vae, latents), tiling)
    height, width = source.shape[-2:]
    rows = tiling.spans(height)
    columns = tiling.spans(width)
    if tiling.overview and len(rows) * len(columns) > 1:
        overview_height, overview_width = tiling.overview_size((height, width))
        network(source[..., :overview_height, :overview_width])
    row, column = (max(axis, key=lambda span: span.stop - span.start) for axis in (rows, columns))
    tile: Tensor = network(source[..., row.start : row.stop, column.start : column.stop])
    return tile


def scale_factor(vae: Any) -> int:
    """Return the number of image pixels along one side of a latent pixel."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _decoder_parts(vae: Any, z: Tensor, tiling: Tiling) -> tuple[Tensor, nn.Module]:
    """Return the input of the tiles and the network that runs on them; small images pass the middle block whole."""
    decoder = vae.decoder
    middle = _Sequence(vae.post_quant_conv, decoder.conv_in, decoder.mid_block)
    rear = _Sequence(*decoder.up_blocks, decoder.conv_norm_out, decoder.conv_act, decoder.conv_out)
    if z.shape[-2] * z.shape[-1] <= tiling.whole_middle:
        return middle(z), rear
    return z, _Sequence(middle, rear)


class _TiledNetwork:
    """A network that runs on the tiles of an image.

    Attributes:
        rows, columns: where the tiles lie.
    """

    def __init__(
        self, network: nn.Module, crop: Callable[[TileSpan, TileSpan], Tensor], tiling: Tiling, size: tuple[int, int]
    ) -> None:
        """Split an image of `size` (height, width) in latent pixels; `crop` returns the network's input for a tile."""
        self.network = network
        self.crop = crop
        self.tiling = tiling
        self.size = size
        self.rows = tiling.spans(size[0])
        self.columns = tiling.spans(size[1])

    @contextmanager
    def shared_statistics(self, overview: Callable[[tuple[int, int]], Tensor]) -> Iterator[None]:
        """Give the group norms the statistics of the whole image inside; `overview` returns the downscaled input."""
        single = len(self.rows) == len(self.columns) == 1
        with tiled_group_norms([] if single else [self.network]) as shared:
            if self.tiling.exact:
                for _ in shared.norms:
                    for row, column in product(self.rows, self.columns):
                        shared.start(row, column)
                        self.network(self.crop(row, column))
                    shared.finalize()
            elif self.tiling.overview and shared.norms:
                height, width = self.tiling.overview_size(self.size)
                shared.start(_whole_axis(height), _whole_axis(width))
                self.network(overview((height, width)))
                shared.finalize()
            yield

    def run(self, progress: StepCallback | None) -> Iterator[tuple[TileSpan, TileSpan, Tensor]]:
        """Yield every tile's position and output, row by row."""
        positions = list(product(self.rows, self.columns))
        for number, (row, column) in enumerate(positions):
            yield row, column, self.network(self.crop(row, column))
            if progress is not None:
                progress(number + 1, len(positions))


def _whole_axis(total: int) -> TileSpan:
    return TileSpan(0, total, (0, total), (0, 0))


def _add_tile(canvas: ImageCanvas, tile: Tensor, row: TileSpan, column: TileSpan, factor: int) -> None:
    if not tile.isfinite().all():
        raise FloatingPointError(
            f"The autoencoder returned pixels that are not finite in {tile.dtype}; SDXL's autoencoder overflows in "
            "float16. Convert it first: pipe.vae.to(torch.float32)."
        )
    rows = row.blend_weights(factor)
    columns = column.blend_weights(factor)
    top = row.start * factor
    left = column.start * factor
    region = tile[0, :, rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]
    canvas.add(region.float().cpu(), rows, columns)


def _unscale(vae: Any, latents: Tensor) -> Tensor:
    mean, std = _latent_statistics(vae, latents)
    return (latents / vae.config.scaling_factor * std + mean).to(next(vae.parameters()).dtype)


def _scale(vae: Any, latents: Tensor) -> Tensor:
    mean, std = _latent_statistics(vae, latents)
    return (latents - mean) / std * vae.config.scaling_factor


def _latent_statistics(vae: Any, like: Tensor) -> tuple[Any, Any]:
    """Return the mean and standard deviation that the autoencoder standardizes latents by; 0 and 1 for most.

    Those of Stable Diffusion 3 and Flux have one mean, `shift_factor`.
    """
    values = (vae.config.latents_mean, vae.config.latents_std)
    if None in values:
        return getattr(vae.config, "shift_factor", None) or 0.0, 1.0
    mean, std = (torch.tensor(value, device=like.device, dtype=like.dtype).view(1, -1, 1, 1) for value in values)
    return mean, std


class _Sequence(nn.Sequential):
    """Modules in sequence; modules that a model lacks (None) are left out."""

    def __init__(self, *modules: nn.Module | None) -> None:
        super().__init__(*(module for module in modules if module is not None))
