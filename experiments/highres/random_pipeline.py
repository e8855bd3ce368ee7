"""A Stable Diffusion pipeline with random weights, to plan and to measure without downloading a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor, nn

from unet_adapters.hosts import find_host
from unet_adapters.hosts.unet_profiles import UNetProfile

VAE_CONFIG = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""The autoencoder of every Stable Diffusion: its published config where it differs from diffusers' defaults."""

TEXT_ENCODER_PARAMETERS = {768: 123_060_480, 1024: 340_387_840, 2048: 123_060_480 + 694_659_840}
"""Parameters of the published text encoders (CLIP L; OpenCLIP H; CLIP L and bigG), by the width of their output."""


class RandomPipeline:
    """The parts of a pipeline that `unet_adapters.highres` uses, with random weights and random conditions.

    Time and memory do not depend on the values of weights. The autoencoder is float32, as in `load_teacher`.
    """

    vae_scale_factor = 8

    def __init__(self, profile: UNetProfile, dtype: torch.dtype, device: str | torch.device, initialize: bool) -> None:
        """Build the networks of `profile`.

        Args:
            profile: a published UNet.
            dtype: of the UNet and the text encoders.
            device: where the networks are.
            initialize: fill the weights with random values; otherwise they are untouched pages, which take no memory
                and are enough for plans.
        """
        self.profile = profile
        self.dtype = dtype
        self.device = torch.device(device)
        self.unet = _materialize(profile.unet("meta"), dtype, self.device, initialize)
        with torch.device("meta"):
            vae = AutoencoderKL(**VAE_CONFIG, scaling_factor=0.18215)
        self.vae = _materialize(vae, torch.promote_types(dtype, torch.float32), self.device, initialize)
        self.scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        )

    @property
    def components(self) -> dict[str, Any]:
        """The networks, with a placeholder of the text encoders' size on the meta device."""
        size = TEXT_ENCODER_PARAMETERS.get(self.profile.config["cross_attention_dim"], 0)
        placeholder = nn.Module()
        placeholder.weight = nn.Parameter(torch.empty(size, dtype=self.dtype, device="meta"), requires_grad=False)
        components = {"unet": self.unet, "vae": self.vae, "text_encoder": placeholder, "scheduler": self.scheduler}
        if self.unet.config.addition_embed_type == "text_time":
            components["text_encoder_2"] = nn.Module()  # counted with the first
        return components

    def encode_prompt(self, prompt: str, **options: Any) -> tuple[Tensor, ...]:
        """Return normally distributed tensors in the shapes of the text encoders' outputs."""
        shapes = find_host(self.unet).condition_shapes()
        names = [name for name in ("text", "pooled") if name in shapes for _ in ("positive", "negative")]
        with fixed_seed():
            return tuple(torch.randn(shapes[name]).to(self.device, self.dtype) for name in names)


@contextmanager
def fixed_seed() -> Iterator[None]:
    """Use the same random numbers inside every time, so that a resumed run has the model that it started with."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _materialize(network: Any, dtype: torch.dtype, device: torch.device, initialize: bool) -> Any:
    """Give a network on the meta device memory on `device`, and random weights with `initialize`."""
    network = nn.Module.to(network, dtype).to_empty(device=device).requires_grad_(False).eval()
    with fixed_seed():
        for parameter in network.parameters() if initialize else ():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(0.5)
    for name, buffer in network.named_buffers():
        raise AssertionError(f"the buffer {name} {tuple(buffer.shape)} has no initial value")
    return network
