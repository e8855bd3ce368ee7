"""A teacher and its training data, opened once and shared by the cells of a grid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from experiments.data import CaptionedImages, batch, open_dataset
from experiments.teacher.load import load_teacher
from experiments.training import FitConfig, pick


@dataclass(frozen=True)
class Setting:
    """The teacher with encoded training pictures: latents (n, c, h, w), text states (n, t, d)."""

    pipe: StableDiffusionPipeline
    held_out: CaptionedImages
    latents: Tensor
    states: Tensor

    def batch(self, step: int, config: FitConfig) -> tuple[Tensor, Tensor]:
        """The batch of `step`, a function of the seed and the step alone: latents and text states."""
        picked = pick(step, config, len(self.latents))
        return self.latents[picked], self.states[picked]


@lru_cache(maxsize=1)
def open_setting(teacher: str, data: str, size: int, images: int) -> Setting:
    """Load the teacher and encode `images` training pictures at `size` px (about 300 a second on two cores)."""
    pipe = load_teacher(teacher)
    pictures = open_dataset(data, split="train")
    draw = torch.Generator().manual_seed(0)
    indices = torch.randint(0, len(pictures), (images,), generator=draw).tolist()
    encoded = [
        encode(pipe, *batch(pictures, indices[i : i + 32], size, range(i, i + len(indices[i : i + 32]))))
        for i in range(0, images, 32)
    ]
    latents, states = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    return Setting(pipe, open_dataset(data, split="held_out"), latents, states)


@torch.no_grad()
def encode(pipe: StableDiffusionPipeline, images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Images (b, 3, s, s) in [-1, 1] and captions -> scaled latents (b, c, s', s') and text states (b, t, d)."""
    latents = pipe.vae.encode(images.to(pipe.device)).latent_dist.mean * pipe.vae.config.scaling_factor
    states, _ = pipe.encode_prompt(captions, pipe.device, 1, do_classifier_free_guidance=False)
    return latents, states
