"""What large images are made with: a real pipeline, or an architecture with random weights, to plan and to measure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor, nn

from experiments.teacher.load import load_teacher
from mixers.suggest import hint
from unet_adapters import MixerAdapter
from unet_adapters.hosts import find_host
from unet_adapters.profiles import PROFILES, Profile

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""The autoencoder of every Stable Diffusion (its published config, where that differs from diffusers' defaults)."""

TEXT_ENCODERS = {768: 123_060_480, 1024: 340_387_840, 2048: 123_060_480 + 694_659_840}
"""Parameters of the published text encoders, by the width of the text states: CLIP L, OpenCLIP H, CLIP L and bigG."""


class Architecture:
    """A Stable Diffusion pipeline without trained weights: its UNet, autoencoder and schedule, and made-up conditions.

    Time and memory do not depend on the values of weights. The autoencoder is float32, as `load_teacher` has it. It has
    the parts of a pipeline that `unet_adapters.highres` asks for.
    """

    vae_scale_factor = 8

    def __init__(self, profile: Profile, dtype: torch.dtype, device: str | torch.device, filled: bool) -> None:
        """With `filled`, random weights; without, memory that nobody has touched, which costs none, for plans."""
        self.profile, self.dtype, self.device = profile, dtype, torch.device(device)
        self.unet = _network(lambda: profile.unet("meta"), dtype, self.device, filled)
        with torch.device("meta"):
            vae = AutoencoderKL(**VAE, scaling_factor=0.18215)
        self.vae = _network(lambda: vae, torch.promote_types(dtype, torch.float32), self.device, filled)
        self.scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        )

    @property
    def components(self) -> dict[str, Any]:
        """The networks, and one that stands for the text encoders' weights."""
        width = self.profile.config["cross_attention_dim"]
        stand_in = nn.Module()
        size = TEXT_ENCODERS.get(width, 0)
        stand_in.weight = nn.Parameter(torch.empty(size, dtype=self.dtype, device="meta"), requires_grad=False)
        return {"unet": self.unet, "vae": self.vae, "text_encoder": stand_in, "scheduler": self.scheduler}

    def encode_prompt(self, prompt: str, **settings: Any) -> tuple[Tensor, ...]:
        """Normal numbers in the shapes of what text encoders give."""
        shapes = find_host(self.unet).condition_shapes()
        names = [name for name in ("text", "pooled") if name in shapes for _ in ("positive", "negative")]
        with seeded():
            return tuple(torch.randn(shapes[name]).to(self.device, self.dtype) for name in names)


def _network(make: Any, dtype: torch.dtype, device: torch.device, filled: bool) -> Any:
    network = nn.Module.to(make(), dtype).to_empty(device=device).requires_grad_(False).eval()
    with seeded():
        for parameter in network.parameters() if filled else ():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(0.5)
    for name, buffer in network.named_buffers():
        raise AssertionError(f"a buffer to be filled: {name} {tuple(buffer.shape)}")
    return network


def open_model(model: str, dtype: torch.dtype, device: str, *, filled: bool = True) -> Any:
    """A pipeline by name: `embedded`, a folder, a Hub id, or `random:SD-1.5` for an architecture with random weights.

    Raises:
        ValueError: no such model or architecture.
    """
    kind, _, name = model.partition(":")
    if kind != "random":
        return load_teacher(model, dtype).to(device)
    known = {profile.name: profile for profile in PROFILES}
    if name not in known:
        raise ValueError(f"No architecture {name!r}: expected one of {', '.join(known)}.{hint(name, known)}")
    return Architecture(known[name], dtype, device, filled)


def mount(pipe: Any, adapter: str | None, mixer: str | None) -> MixerAdapter | None:
    """Mount an adapter from a folder or the Hub, or a mixer as it is, untrained; or neither.

    Raises:
        ValueError, FileNotFoundError: no such adapter or mixer, or one that does not fit.
    """
    if adapter is not None:
        published = Path(adapter, "config.json").is_file()
        load = MixerAdapter.from_linfusion if published else MixerAdapter.from_pretrained
        return load(adapter, pipe).mount()
    with seeded():
        return None if mixer is None else MixerAdapter.build(pipe, mixer, train_projections=False).mount()


@contextmanager
def seeded() -> Iterator[None]:
    """What is random inside is the same every time: a run that was killed goes on with the model that it had."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
