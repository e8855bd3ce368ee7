"""Samples from fixed prompts and seeds, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.config import EvaluationConfig
from experiments.metrics.inputs.generated_images import generate_images


def save_samples(pipe: Any, plan: EvaluationConfig, directory: Path) -> None:
    """Write `directory/<size>/<k>.png`: prompt k at each sample size, from the same noise for all variants.

    Those of a sweep's other guidance scales are in `directory/guidance-<value>/<size>/`.

    Args:
        pipe: the teacher's pipeline, whose UNet is used as it is mounted now.
        plan: prompts, sizes, steps, guidance scales, seed.
        directory: receives the files.
    """
    for guidance in plan.all_guidances:
        parent = directory if guidance == plan.guidance else directory / f"guidance-{guidance:g}"
        for size in plan.sample_sizes if plan.prompts else ():
            folder = parent / str(size)
            folder.mkdir(parents=True, exist_ok=True)
            images = generate_images(pipe, plan.prompts, (size, size), plan, guidance, plan.seed)
            for k, image in enumerate(images):
                image.save(folder / f"{k}.png")
