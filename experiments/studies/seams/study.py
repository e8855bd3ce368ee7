"""How far decoding in tiles is from decoding whole: `python -m experiments.studies.seams` measures it.

Drawings of the embedded data set are encoded and decoded by the embedded autoencoder, whole and in tiles. Told is the
difference in gray levels (0 to 255), over all pixels and over the seam: the pixels beside an edge between two cores.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from experiments.data import open_dataset
from experiments.highres.models import open_model
from unet_adapters.highres import Tiling, decode
from unet_adapters.highres.tiles import spans
from unet_adapters.highres.vae import encode

TILINGS = {
    "own statistics, no blending": Tiling(overview=0, blend=0),
    "own statistics": Tiling(overview=0),
    "the overview's statistics": Tiling(),
    "exact statistics": Tiling(exact=True),
}


def seam(size: int, tiling: Tiling, factor: int) -> Tensor:
    """(size, size) bool: pixels within 2 of an edge between two tiles' cores."""
    near = torch.zeros(size, dtype=torch.bool)
    for span in spans(size // factor, tiling.tile, tiling.margin, tiling.blend)[1:]:
        edge = span.core[0] * factor
        near[edge - 2 : edge + 2] = True
    return near[:, None] | near


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="side in pixels")
    parser.add_argument("--tiles", type=int, nargs="+", default=(32, 64, 96), help="sides in latent places")
    parser.add_argument("--images", type=int, default=4)
    given = parser.parse_args()
    vae, size = open_model("embedded", torch.float32, "cpu").vae, given.size
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    data, whole = open_dataset("emoji", split="held_out"), Tiling(tile=size)
    table = Table("tile", "statistics", "difference, RMS", "on the seam, RMS", "largest")
    pictures = [
        ((data.example(i, size).image.permute(1, 2, 0) + 1) * 127.5).round().byte() for i in range(given.images)
    ]
    latents = [encode(vae, picture, whole) for picture in pictures]
    plain = [decode(vae, z, whole).float() for z in latents]
    for tile in given.tiles:
        for name, tiling in TILINGS.items():
            cut = replace(tiling, tile=tile, overview=min(tiling.overview, size // factor // 2))
            apart = [(decode(vae, z, cut).float() - wanted).abs() for z, wanted in zip(latents, plain, strict=True)]
            every, beside = torch.stack(apart), torch.stack([a[seam(size, cut, factor)] for a in apart])
            rms = (f"{x.square().mean().sqrt():.2f}" for x in (every, beside))
            table.add_row(str(tile), name, *rms, f"{every.max():.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
