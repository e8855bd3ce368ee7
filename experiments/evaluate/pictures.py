"""Samples from fixed prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from experiments.config import EvaluationConfig
from experiments.distill.loss import autocast
from experiments.teacher.teacher import Teacher


@torch.no_grad()
def save_samples(pipe: Any, config: EvaluationConfig, directory: Path) -> None:
    """Write `directory/<size>/<k>.png`: prompt k at each sample size, the same starting noise for all variants.

    Those of a sweep's other guidances are in `directory/guidance-<value>/<size>/`.
    """
    for guidance in config.all_guidances:
        place = directory if guidance == config.guidance else directory / f"guidance-{guidance:g}"
        for size in config.sample_sizes if config.prompts else ():
            folder = place / str(size)
            folder.mkdir(parents=True, exist_ok=True)
            for k, image in enumerate(draw(pipe, config.prompts, (size, size), config, guidance, config.seed)):
                image.save(folder / f"{k}.png")


def draw(
    pipe: Any, prompts: Sequence[str], extent: tuple[int, int], config: EvaluationConfig, guidance: float, seed: int
) -> list[Image.Image]:
    """A picture a prompt, all at once, by the UNet as it is mounted now; noise seed + k for prompt k, from the CPU."""
    with autocast(Teacher(pipe)):
        images: list[Image.Image] = pipe(
            list(prompts),
            height=extent[0],
            width=extent[1],
            num_inference_steps=config.sample_steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + k) for k in range(len(prompts))],
        ).images
    return images
