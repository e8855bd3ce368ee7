"""The autoencoder in tiles: tiles partition the image, and equal the plain autoencoder."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.unet_adapters import pipelines
from unet_adapters.highres import Tiling, decode_tiled, encode_tiled
from unet_adapters.highres.tiles import ImageCanvas, split_into_tiles


@given(st.integers(1, 200), st.integers(8, 50), st.integers(0, 20), st.integers(0, 2), st.sampled_from([1, 4, 8]))
def test_cores_partition_the_axis_and_weights_sum_to_one(
    total: int, tile: int, margin: int, blend: int, factor: int
) -> None:
    spans = split_into_tiles(total, tile, margin, blend)
    assert [index for span in spans for index in range(*span.core)] == list(range(total))
    sums = torch.zeros(total * factor)
    for span in spans:
        start, stop, weights = span.blend_weights(factor)
        assert span.start * factor <= start and stop <= span.stop * factor
        sums[start:stop] += weights
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_a_canvas_reassembles_an_image() -> None:
    pixels = pipelines.noise(3, 20, 30).clamp(-1, 1)
    canvas = ImageCanvas(20, 30)
    for row in split_into_tiles(20, 8, 3, 2):
        for column in split_into_tiles(30, 8, 3, 2):
            rows = row.blend_weights(1)
            columns = column.blend_weights(1)
            canvas.add(pixels[:, rows[0] : rows[1], columns[0] : columns[1]], rows, columns)
        canvas.complete_rows(row.core[1] - row.blend[1])
    expected = (pixels.permute(1, 2, 0) + 1) * 127.5
    assert (canvas.pixels - expected).abs().max() <= 0.51


@pytest.mark.parametrize("whole_middle", [0, 10**6])
@torch.no_grad()
def test_exact_tiles_equal_the_plain_autoencoder(whole_middle: int) -> None:
    vae = pipelines.make().vae
    if not whole_middle:  # the middle block sees one tile: exact only without attention
        vae.decoder.mid_block.attentions[0] = None
        vae.encoder.mid_block.attentions[0] = None
    latents = pipelines.noise(1, 4, 40, 31)
    plain = vae.decode(latents / vae.config.scaling_factor).sample[0].permute(1, 2, 0).clamp(-1, 1)
    tiling = Tiling(tile=12, margin=24, blend=2, exact=True, whole_middle=whole_middle)
    assert (decode_tiled(vae, latents, tiling) - (plain + 1) * 127.5).abs().max() < 0.51
    image = torch.randint(0, 256, (80, 62, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = (image / 127.5 - 1).permute(2, 0, 1)[None]
    expected = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(encode_tiled(vae, image, tiling), expected, rtol=1e-5, atol=1e-5)
    assert all(type(module) is nn.GroupNorm for module in vae.modules() if isinstance(module, nn.GroupNorm))


@torch.no_grad()
def test_an_overview_brings_tiles_closer_to_the_whole_image() -> None:
    vae = pipelines.make().vae
    slope = torch.linspace(-2, 2, 48)  # corners differ; with its own statistics, every tile would get a middling tone
    latents = pipelines.noise(1, 4, 48, 48) * 0.3 + slope[:, None] + slope
    plain = (vae.decode(latents / vae.config.scaling_factor).sample[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5

    def error(overview: int) -> float:
        return float((decode_tiled(vae, latents, Tiling(tile=12, blend=2, overview=overview)) - plain).abs().mean())

    assert error(overview=24) < 0.5 * error(overview=0)


@pytest.mark.parametrize("size", [(48, 48), (40, 56), (31, 45)])
@torch.no_grad()
def test_an_overview_brings_encoded_tiles_closer_to_the_whole_image(size: tuple[int, int]) -> None:
    """Ratios of image and overview that are no whole numbers: a crop of a corner would have another tone."""
    vae = pipelines.make().vae
    height, width = (side * 2 for side in size)
    slope = torch.linspace(0, 1, height)[:, None] * torch.linspace(0, 1, width)
    noise = pipelines.noise(height, width, 3) * 4
    image = (slope[..., None] * 230 + noise + 12).clamp(0, 255).to(torch.uint8)
    pixels = (image / 127.5 - 1).permute(2, 0, 1)[None]
    plain = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor

    def error(overview: int) -> float:
        return float((encode_tiled(vae, image, Tiling(tile=12, blend=2, overview=overview)) - plain).abs().mean())

    assert error(overview=28) < 0.5 * error(overview=0)


@torch.no_grad()
def test_values_that_are_not_finite_raise() -> None:
    vae = pipelines.make().vae
    latents = pipelines.noise(1, 4, 16, 16)
    with pytest.raises(FloatingPointError, match="latents that are not finite"):
        decode_tiled(vae, latents.log(), Tiling(tile=12))
    vae.decoder.conv_out.bias[0] = float("inf")
    with pytest.raises(FloatingPointError, match="overflows in float16"):
        decode_tiled(vae, latents, Tiling(tile=12))
