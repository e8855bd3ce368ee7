"""Estimates of memory and operations: of one call of the UNet, and of decoding an image in tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unet_adapters.highres.autoencoder import Tiling, decode_largest_tile
from unet_adapters.highres.memory import AllocationCounter, estimate_memory
from unet_adapters.highres.pipeline import denoiser, size_multiple, uses_guidance, vae_scale_factor, weight_bytes
from unet_adapters.highres.savings import CHUNK_TOKENS, save_memory
from unet_adapters.highres.stages import ImageSize
from unet_adapters.hosts import find_host

TRACED_LATENT_PIXELS = 8192
"""Images of up to so many latent pixels are traced operation by operation; larger ones are extrapolated."""

MIN_CHUNK_TOKENS = 512  # smaller chunks of the smaller, traced images only take time


class UNetCallEstimate(NamedTuple):
    """What one call of a UNet needs: peak bytes, elements of the largest tensor, floating-point operations."""

    peak_bytes: int
    largest_tensor: int
    flops: int


class MemoryEstimator:
    """Estimates for one pipeline, each computed once.

    Attributes:
        batch: images that the UNet predicts per step: 2 under classifier-free guidance.
        weight_bytes: size of all weights of the pipeline.
    """

    def __init__(self, pipe: Any, guidance: float, device: torch.device) -> None:
        """Estimate for `device`, which may differ from where the pipeline is."""
        self.pipe = pipe
        self.batch = 2 if uses_guidance(pipe, guidance) else 1
        self.weight_bytes = weight_bytes(pipe)
        on_cpu = device.type == "cpu"
        self._trace = cache(lambda size, savings, chunk: _trace_unet(pipe, size, savings, chunk, self.batch, on_cpu))
        self._decoding = cache(lambda size, tiling: estimate_decoding(pipe, size, tiling, on_cpu).peak_bytes)

    def decoding_bytes(self, size: ImageSize, tiling: Tiling) -> int:
        """Return the peak of decoding an image of `size` in bytes, without the weights."""
        return self._decoding(size, tiling)

    def unet_call(self, size: ImageSize, savings: tuple[str, ...]) -> UNetCallEstimate:
        """Estimate one call of the UNet; see `estimate_unet_call`."""
        pixels = size[0] * size[1]
        ratio = pixels / (TRACED_LATENT_PIXELS * vae_scale_factor(self.pipe) ** 2)
        if ratio <= 1:
            counter = self._trace(size, savings, CHUNK_TOKENS)
            return UNetCallEstimate(counter.peak_bytes, counter.largest_tensor, counter.flops)
        chunk = max(MIN_CHUNK_TOKENS, CHUNK_TOKENS >> int(math.log2(ratio)))
        larger = self._scaled(size, ratio)
        smaller = self._scaled(size, 2 * ratio)
        high = self._trace(larger, savings, chunk)
        low = self._trace(smaller, savings, chunk)
        larger_pixels = larger[0] * larger[1]
        share = (pixels - larger_pixels) / (larger_pixels - smaller[0] * smaller[1])

        def extrapolate(low_value: int, high_value: int) -> int:
            return round(high_value + (high_value - low_value) * share)

        # Per module, because a large image need not have its peak in the same module as a small one.
        peak = max(extrapolate(low.module_peaks[name], high.module_peaks[name]) for name in high.module_peaks)
        largest = max(extrapolate(low.module_tensors[name], high.module_tensors[name]) for name in high.module_tensors)
        return UNetCallEstimate(peak, largest, extrapolate(low.flops, high.flops))

    def _scaled(self, size: ImageSize, ratio: float) -> ImageSize:
        """Return a size of the same shape with 1 / ratio of the pixels, up to rounding."""
        multiple = size_multiple(self.pipe)
        height, width = (max(multiple, round(side / ratio**0.5 / multiple) * multiple) for side in size)
        return height, width


def estimate_unet_call(pipe: Any, size: ImageSize, savings: Sequence[str], guidance: float) -> UNetCallEstimate:
    """Estimate one call of the UNet in `denoise` for an image of `size`.

    Images beyond TRACED_LATENT_PIXELS are extrapolated linearly from two smaller sizes, separately for every module,
    with proportionally smaller chunks of feed-forward layers: mixers loop over blocks of tokens, and a million blocks
    take long even if nothing is computed. With a linear mixer every quantity is linear in the number of pixels; under
    softmax attention the operations are not, and the estimate of the operations is too low.

    Args:
        pipe: the pipeline, with its mixer mounted.
        size: (height, width) in pixels.
        savings: some of `SAVINGS`.
        guidance: guidance scale; 1 halves the batch.
    """
    return MemoryEstimator(pipe, guidance, denoiser(pipe).device).unet_call(size, tuple(savings))


def estimate_decoding(pipe: Any, size: ImageSize, tiling: Tiling, on_cpu: bool | None = None) -> AllocationCounter:
    """Count the memory of decoding an image of `size` in tiles: the largest of middle block, overview and tile.

    Args:
        pipe: the pipeline.
        size: (height, width) in pixels.
        tiling: how the image is split.
        on_cpu: whether a CPU will decode it; None: as the autoencoder's device says.
    """
    vae = pipe.vae
    factor = vae_scale_factor(pipe)
    latents = (1, vae.config.latent_channels, size[0] // factor, size[1] // factor)
    dtype = next(vae.parameters()).dtype
    return estimate_memory(
        lambda z: decode_largest_tile(vae, z, tiling), vae, (latents, dtype), device=vae.device, on_cpu=on_cpu
    )


def _trace_unet(
    pipe: Any, size: ImageSize, savings: Sequence[str], chunk: int, batch: int, on_cpu: bool
) -> AllocationCounter:
    network = denoiser(pipe)
    batch = 1 if "guidance" in savings else batch
    height, width = (side // vae_scale_factor(pipe) for side in size)
    host = find_host(pipe)
    shapes = host.condition_shapes(batch)

    def run(latents: Tensor, *tensors: Tensor) -> Tensor:
        return host.predict(latents, torch.tensor(500), dict(zip(shapes, tensors, strict=True)))

    with save_memory(network, savings, chunk, simulate=True):
        inputs = [(shape, network.dtype) for shape in (host.latent_shape((height, width), batch), *shapes.values())]
        return estimate_memory(run, network, *inputs, device=network.device, on_cpu=on_cpu)
