"""Benchmarks of whole blocks, of mixers as they are mounted, and of UNets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from experiments.bench import baselines
from experiments.bench.attention_layer import EMBEDDED, SITE_SHAPES
from experiments.bench.benchmark import Benchmark, BuildCall
from experiments.bench.calls import forward_call
from experiments.bench.config import BenchmarkConfig
from experiments.teacher import load
from mixers import create_mixer, list_mixers, registry
from mixers.suggest import unknown_name

SOFTMAX = "softmax"
DEFAULT_MIXER = "linfusion"
PUBLISHED_VAE_SCALE_FACTOR = 8  # of every Stable Diffusion
PROFILE_NAMES = {"sd15": "SD-1.5", "sd21": "SD-2.1", "sdxl": "SDXL base"}


@dataclass(frozen=True)
class UNetBenchmarkConfig:
    """What the benchmark of a UNet measures.

    Attributes:
        profile: "embedded" or one of `PROFILE_NAMES`.
        mixer: the mixer to mount.
        min_tokens: the threshold of the hybrid, which keeps softmax attention below it.
        sizes: sides of square images, in pixels.
    """

    profile: str = EMBEDDED
    mixer: str = DEFAULT_MIXER
    min_tokens: int = 512
    sizes: tuple[int, ...] = (64, 128, 256, 512)


def layer_benchmarks(config: BenchmarkConfig, dim: int = 320, heads: int = 5) -> Iterator[Benchmark]:
    """Yield benchmarks of whole blocks with published defaults, against transformers' and a softmax block."""
    builders = {"mamba": baselines.transformers_mamba, "mamba2": baselines.transformers_mamba2}
    for name, build_baseline in builders.items():
        own_heads = 1 if name == "mamba" else 2 * dim // 64
        implementations = {
            "ours": _build_block(config, partial(create_mixer, name, dim, own_heads), dim),
            "transformers": _build_block(config, partial(build_baseline, dim), dim),
            "softmax block": _build_block(config, partial(create_mixer, SOFTMAX, dim, heads), dim),
        }
        others = frozenset({"transformers", "softmax block"})
        yield Benchmark(f"{name} block, d {dim}: forward", implementations, config.lengths, others)


def growth_benchmarks(config: BenchmarkConfig, dim: int = 320, heads: int = 8) -> Iterator[Benchmark]:
    """Yield one benchmark of every mixer but softmax, as mounted, on one square image: how time grows with tokens."""
    names = [name for name in list_mixers() if name != SOFTMAX]
    implementations = {name: _build_mounted(config, name, dim, heads) for name in names}
    yield Benchmark(f"mixers as mounted, d {dim}: forward", implementations, config.lengths, measures_growth=True)


def unet_benchmarks(config: BenchmarkConfig, unet_config: UNetBenchmarkConfig) -> Iterator[Benchmark]:
    """Yield one benchmark of a UNet: with stock attention, with a mixer everywhere, and with `min_tokens`.

    Raises:
        ValueError: no such profile or mixer.
    """
    profile = unet_config.profile
    mixer = unet_config.mixer
    if profile not in (EMBEDDED, *SITE_SHAPES):
        raise ValueError(unknown_name("profile", profile, (EMBEDDED, *SITE_SHAPES)))
    registry.get_mixer_entry(mixer)  # an unknown name raises here, before any work
    implementations = {
        mixer: _build_unet(config, profile, mixer, select="all"),
        "stock": _build_unet(config, profile, None),
        f"{mixer} from {unet_config.min_tokens} tokens": _build_unet(
            config, profile, mixer, min_tokens=unet_config.min_tokens
        ),
    }
    name = f"UNet {profile}: forward"
    yield Benchmark(name, implementations, unet_config.sizes, frozenset({"stock"}), size_unit="px")


def _build_block(config: BenchmarkConfig, build: Callable[[], Any], dim: int) -> BuildCall:
    def build_call(length: int) -> Callable[[], object]:
        torch.manual_seed(0)
        block = build().to(config.device, config.dtype).eval()
        return forward_call(block, config.randn(1, length, dim))

    return build_call


def _build_mounted(config: BenchmarkConfig, name: str, dim: int, heads: int) -> BuildCall:
    def build_call(length: int) -> Callable[[], object]:
        torch.manual_seed(0)
        options = registry.get_mixer_entry(name).mixer.drop_in_options
        mixer = create_mixer(name, dim, heads, **options).to(config.device, config.dtype).eval()
        side = math.isqrt(length)
        return forward_call(partial(mixer, grid=(side, side)), config.randn(1, side * side, dim))

    return build_call


def _build_unet(config: BenchmarkConfig, profile: str, mixer: str | None, **options: Any) -> BuildCall:
    from unet_adapters import MixerAdapter
    from unet_adapters.hosts import find_host

    def build_call(side: int) -> Callable[[], object]:
        unet, vae_scale_factor = _open_unet(profile, config)
        if mixer is not None:
            MixerAdapter.build(unet, mixer, train_projections=False, **options).mount()
        latent_side = side // vae_scale_factor
        inputs = find_host(unet).dummy_inputs((latent_side, latent_side), config.batch)
        return forward_call(lambda: unet(**inputs, return_dict=False)[0])

    return build_call


def _open_unet(profile: str, config: BenchmarkConfig) -> tuple[UNet2DConditionModel, int]:
    """Return a UNet and the scale factor of its VAE."""
    from unet_adapters.hosts import unet_profiles

    if profile == EMBEDDED:
        unet = UNet2DConditionModel.from_pretrained(load.EMBEDDED, subfolder="unet")
        vae_config = AutoencoderKL.load_config(load.EMBEDDED, subfolder="vae")
        vae_scale_factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
        return unet.to(config.device, config.dtype).requires_grad_(False).eval(), vae_scale_factor
    published = next(p for p in unet_profiles.PROFILES if p.name == PROFILE_NAMES[profile])
    return published.unet(config.device).to(config.dtype).requires_grad_(False), PUBLISHED_VAE_SCALE_FACTOR
