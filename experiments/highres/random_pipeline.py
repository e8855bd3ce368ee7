"""A text-to-image pipeline with random weights, to plan and to measure without downloading a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from unet_adapters.hosts import find_host
from unet_adapters.hosts.transformers.profiles import TransformerProfile
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

    def __init__(
        self,
        profile: UNetProfile | TransformerProfile,
        dtype: torch.dtype,
        device: str | torch.device,
        initialize: bool,
    ) -> None:
        """Build the networks of `profile`.

        Args:
            profile: a published UNet or transformer.
            dtype: of the denoising network and the text encoders.
            device: where the networks are.
            initialize: fill the weights with random values; otherwise they are untouched pages, which take no memory
                and are enough for plans.
        """
        self.profile = profile
        self.dtype = dtype
        self.device = torch.device(device)
        self.unet: Any = None
        self.transformer: Any = None
        self.scheduler: Any = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        )
        vae_config = {**VAE_CONFIG, "scaling_factor": 0.18215}
        if isinstance(profile, TransformerProfile):
            self.transformer = _materialize(profile.model("meta"), dtype, self.device, initialize)
            self._text_parameters = profile.text_parameters
            vae_config |= dict(profile.vae)
            if profile.flow is not None:
                self.scheduler = FlowMatchEulerDiscreteScheduler(**profile.flow)
        else:
            self.unet = _materialize(profile.unet("meta"), dtype, self.device, initialize)
            self._text_parameters = TEXT_ENCODER_PARAMETERS.get(profile.config["cross_attention_dim"], 0)
        with torch.device("meta"):
            vae = AutoencoderKL(**vae_config)
        self.vae = _materialize(vae, torch.promote_types(dtype, torch.float32), self.device, initialize)

    @property
    def components(self) -> dict[str, Any]:
        """The networks, with a placeholder of the text encoders' size on the meta device."""
        placeholder = nn.Module()
        empty = torch.empty(self._text_parameters, dtype=self.dtype, device="meta")
        placeholder.weight = nn.Parameter(empty, requires_grad=False)
        components = {"vae": self.vae, "text_encoder": placeholder, "scheduler": self.scheduler}
        if self.unet is None:
            return components | {"transformer": self.transformer}
        components["unet"] = self.unet
        if self.unet.config.addition_embed_type == "text_time":
            components["text_encoder_2"] = nn.Module()  # counted with the first
        return components

    def encode_prompt(self, prompt: str | list[str], *others: Any, **options: Any) -> tuple[Tensor, ...]:
        """Return normally distributed tensors in the shapes of the text encoders' outputs."""
        shapes = find_host(self).condition_shapes()
        if isinstance(self.profile, TransformerProfile):
            names = list(self.profile.encoded)
        else:
            names = [name for name in ("text", "pooled") if name in shapes for _ in ("positive", "negative")]
        with fixed_seed():
            return tuple(self._draw(name, shapes) for name in names)

    def _draw(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
        if name == "text_mask":
            return torch.ones(shapes["text"][:2], dtype=torch.int64, device=self.device)
        return torch.randn(shapes[name]).to(self.device, self.dtype)


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
        for buffer in network.buffers() if initialize else ():  # tables of positions
            buffer.normal_(std=0.02)
    return network
