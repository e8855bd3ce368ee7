"""Sample sheets: what the teacher draws for captions that nobody picked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from experiments.data import SceneSet
from experiments.data.scenes import Scene
from unet_adapters.hosts import find_host

GUIDANCE = 3.0
STEPS = 50


def unpicked_scenes(count: int, split: str = "train", kinds: tuple[str, ...] | None = None) -> list[Scene]:
    """Return scenes at indices spread over a data set in a fixed random order."""
    data = SceneSet(split, kinds=kinds)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))[:count].tolist()
    return [data.scene(index, 9_000_000) for index in order]


@torch.no_grad()
def draw_samples(
    pipe: DiffusionPipeline, captions: list[str], size: int = 64, guidance: float = GUIDANCE, steps: int = STEPS
) -> Tensor:
    """Return one image per caption, seed k for caption k: (n, 3, size, size) in [-1, 1]."""
    exact = find_host(pipe).sampling_options(pipe)
    parts = []
    for start in range(0, len(captions), 20):
        chunk = captions[start : start + 20]
        seeds = [torch.Generator().manual_seed(start + k) for k in range(len(chunk))]
        options = {"height": size, "width": size, "num_inference_steps": steps, "guidance_scale": guidance, **exact}
        parts.append(pipe(chunk, generator=seeds, output_type="pt", **options).images * 2 - 1)
    return torch.cat(parts).float()


def make_sheet(images: Tensor, columns: int = 10, scale: int = 2) -> Image.Image:
    """Return images (n, 3, s, s) in [-1, 1] as one sheet without captions, each pixel enlarged `scale` times."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    side = images.shape[-1]
    gap = 2
    rows = -(-len(images) // columns)
    page = np.full((rows * (side + gap) + gap, columns * (side + gap) + gap, 3), 255, dtype=np.uint8)
    for number, tile in enumerate(pixels):
        top = gap + (number // columns) * (side + gap)
        left = gap + (number % columns) * (side + gap)
        page[top : top + side, left : left + side] = tile
    image = Image.fromarray(page)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def write_sheet(pipe: DiffusionPipeline, path: Path, count: int = 40, size: int = 64) -> list[str]:
    """Draw `count` unpicked training captions, write the sheet, and return the captions."""
    captions = [scene.caption for scene in unpicked_scenes(count)]
    make_sheet(draw_samples(pipe, captions, size)).save(path)
    return captions
