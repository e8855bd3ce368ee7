"""Samples from fixed prompts and seeds."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from experiments.config import Evaluation


@torch.no_grad()
def save_samples(pipe: StableDiffusionPipeline, config: Evaluation, directory: Path) -> None:
    """Write `directory/<size>/<k>.png`: prompt k at each sample size, the same starting noise for all variants."""
    for size in config.sample_sizes:
        folder = directory / str(size)
        folder.mkdir(parents=True, exist_ok=True)
        noise = [torch.Generator().manual_seed(config.seed + k) for k in range(len(config.prompts))]
        images = pipe(
            list(config.prompts),
            height=size,
            width=size,
            num_inference_steps=config.sample_steps,
            guidance_scale=config.guidance,
            generator=noise,
        ).images
        for k, image in enumerate(images):
            image.save(folder / f"{k}.png")
