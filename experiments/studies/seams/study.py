"""Measure how far decoding in tiles is from decoding in one piece.

    python -m experiments.studies.seams [--size 1024] [--tiles 32 64 96] [--images 4]

Drawings of the embedded data set are encoded and decoded by the embedded autoencoder, in one piece and in tiles. The
table reports the difference in gray levels (0 to 255), over all pixels and over the seams: the pixels within 2 of an
edge between two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from experiments.data import open_dataset
from experiments.highres.pipelines import open_pipeline
from unet_adapters.highres import Tiling, decode_tiled, encode_tiled
from unet_adapters.highres.autoencoder import scale_factor

TILINGS = {
    "own statistics, no blending": Tiling(overview=0, blend=0),
    "own statistics": Tiling(overview=0),
    "the overview's statistics": Tiling(),
    "exact statistics": Tiling(exact=True),
}


class SeamDifference(NamedTuple):
    """Differences from decoding in one piece, in gray levels.

    Attributes:
        tile: side of a tile's core in latent pixels.
        tiling: name in `TILINGS`.
        rms, seam_rms, largest: root mean square over all pixels and over the seams, and the maximum.
    """

    tile: int
    tiling: str
    rms: float
    seam_rms: float
    largest: float


def measure_differences(vae: Any, images: Sequence[Tensor], tiles: Sequence[int]) -> Iterator[SeamDifference]:
    """Compare every tile size and tiling with decoding in one piece.

    Args:
        vae: the autoencoder.
        images: square images (size, size, 3) of uint8.
        tiles: sides of the tiles' cores in latent pixels.
    """
    size = len(images[0])
    factor = scale_factor(vae)
    one_piece = Tiling(tile=size)
    latents = [encode_tiled(vae, image, one_piece) for image in images]
    references = [decode_tiled(vae, z, one_piece).float() for z in latents]
    for tile in tiles:
        for name, tiling in TILINGS.items():
            tiling = replace(tiling, tile=tile, overview=min(tiling.overview, size // factor // 2))
            decoded = torch.stack([decode_tiled(vae, z, tiling) for z in latents])
            difference = (decoded - torch.stack(references)).abs()
            on_seam = difference[:, seam_mask(size, tiling, factor)]
            yield SeamDifference(tile, name, _rms(difference), _rms(on_seam), float(difference.max()))


def seam_mask(size: int, tiling: Tiling, factor: int) -> Tensor:
    """Return a mask (size, size) of the pixels within 2 of an edge between two tiles' cores."""
    near_edge = torch.zeros(size, dtype=torch.bool)
    for span in tiling.spans(size // factor)[1:]:
        edge = span.core[0] * factor
        near_edge[edge - 2 : edge + 2] = True
    return near_edge[:, None] | near_edge


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _drawings(count: int, size: int) -> list[Tensor]:
    """Return held-out drawings (size, size, 3) as uint8."""
    data = open_dataset("scenes", split="held_out")
    images = [data.example(index, size).image.permute(1, 2, 0) for index in range(count)]
    return [((image + 1) * 127.5).round().byte() for image in images]


def print_differences(rows: Sequence[SeamDifference], console: Console) -> None:
    """Print one row per tile size and tiling."""
    table = Table("tile", "statistics", "difference, RMS", "on the seam, RMS", "largest")
    for row in rows:
        table.add_row(str(row.tile), row.tiling, f"{row.rms:.2f}", f"{row.seam_rms:.2f}", f"{row.largest:.0f}")
    console.print(table)


def main() -> None:
    """Measure with the embedded autoencoder, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="side of the images in pixels")
    parser.add_argument("--tiles", type=int, nargs="+", default=(32, 64, 96), help="sides of tiles in latent pixels")
    parser.add_argument("--images", type=int, default=4, help="number of images")
    arguments = parser.parse_args()
    vae = open_pipeline("embedded", torch.float32, "cpu").vae
    images = _drawings(arguments.images, arguments.size)
    print_differences(list(measure_differences(vae, images, arguments.tiles)), Console())


if __name__ == "__main__":
    main()
