"""The teacher's gates, measured: need of self-attention, drawing, and range."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPModel

from experiments.data import SceneSet, batch
from experiments.data.example import to_tensor
from experiments.data.scenes import Scene, render_scene
from experiments.data.scenes.catalogue import drawings_of_split
from experiments.data.scenes.words import count_phrase
from experiments.teacher.inspect_images import background_accuracy, count_objects
from experiments.teacher.judge import top1_accuracy
from experiments.teacher.need import control_errors, encode_scenes
from experiments.teacher.samples import draw_samples, unpicked_scenes

COUNTED_KINDS = ("single", "counted", "shapes", "copies", "one_color", "relation", "mixed")
BACKGROUND_GOAL = 0.95
COUNT_GOAL = 0.95
TOP1_GOAL = 0.85
PSNR_GOAL = 29.0


def measure_need(pipe: StableDiffusionPipeline, images: int = 64) -> dict[str, Any]:
    """Return velocity errors of softmax attention and of the untrained controls, for held-in and held-out scenes."""
    result = {}
    for split in ("train", "held_out"):
        latents, tokens = encode_scenes(pipe, split, images)
        result[split] = control_errors(pipe, latents, tokens)
    return result


def measure_drawing(
    pipe: StableDiffusionPipeline, judge: CLIPModel, *, size: int = 64, named: int = 100, counted: int = 100
) -> dict[str, float]:
    """Return the share of samples with the right background and count, and the judge's top-1 among 100 names.

    The same numbers of true renders are beside them ("…_true"): no sample can be expected to score higher. All names
    are offered on the background of the caption, so that only the drawing decides.
    """
    singles = unpicked_scenes(named, kinds=("single",))
    scenes = unpicked_scenes(counted, kinds=COUNTED_KINDS)
    result: dict[str, float] = {}
    captions = [scene.caption for scene in singles]
    candidates = [name_candidates(scene) for scene in singles]
    for name, images in (("", draw_samples(pipe, captions, size)), ("_true", render_all(singles, size))):
        small = torch.nn.functional.interpolate(images, (64, 64), mode="area") if size != 64 else images
        result[f"top1{name}"] = top1_accuracy(judge, pipe.tokenizer, small, candidates)
        result[f"single_background{name}"] = background_accuracy(images, captions)
    captions = [scene.caption for scene in scenes]
    for name, images in (("", draw_samples(pipe, captions, size)), ("_true", render_all(scenes, size))):
        result[f"background{name}"] = background_accuracy(images, captions)
        result[f"count{name}"] = count_accuracy(images, scenes)
    return result


def measure_autoencoder(pipe: StableDiffusionPipeline, images: int = 100, size: int = 64) -> float:
    """Return the mean peak signal-to-noise ratio (dB) of the autoencoder on held-out drawings and combinations."""
    data = SceneSet("held_out")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(4))[:images].tolist()
    true, _ = batch(data, order, size, [0] * images)
    values = []
    with torch.no_grad():
        for part in true.split(16):
            decoded = pipe.vae.decode(pipe.vae.encode(part).latent_dist.mean).sample.clamp(-1, 1)
            values.append(-10 * torch.log10((decoded - part).square().mean(dim=(1, 2, 3)) / 4))
    return float(torch.cat(values).mean())


def measure_gates(pipe: StableDiffusionPipeline, judge: CLIPModel) -> dict[str, Any]:
    """Measure everything that needs no further training; about ten minutes on one core."""
    return {
        "psnr": measure_autoencoder(pipe),
        "need": measure_need(pipe),
        "drawing": {str(size): measure_drawing(pipe, judge, size=size) for size in (64, 128)},
    }


def name_candidates(scene: Scene, count: int = 100) -> list[str]:
    """Return `count` captions of single training drawings on a scene's background; the scene's own comes first.

    Other drawings that the judge knows, but the teacher does not, are among them.
    """
    background = scene.caption.rsplit(", ", 1)[1]
    drawings = drawings_of_split("train", others=True)
    captions = (f"{count_phrase(1, drawing.name)}, {background}" for drawing in drawings)
    return list(dict.fromkeys((scene.caption, *captions)))[:count]


def render_all(scenes: list[Scene], size: int) -> Tensor:
    """Return true renders (n, 3, size, size) in [-1, 1]."""
    return torch.stack([to_tensor(render_scene(scene, size)) for scene in scenes])


def count_accuracy(images: Tensor, scenes: list[Scene]) -> float:
    """Return the share of images that show as many objects as their scenes, on the background of the caption."""
    right = 0
    for image, scene in zip(images, scenes, strict=True):
        background = scene.caption.rsplit(", ", 1)[1].removesuffix(" background")
        right += count_objects(image, background) == len(scene.placements)
    return right / len(scenes)


def format_need(errors: dict[str, dict[int, float]]) -> list[tuple[str, ...]]:
    """Return table rows: timestep, softmax's error, and every control's error over softmax's."""
    controls = [name for name in errors if name != "softmax"]
    rows: list[tuple[str, ...]] = [("t", "softmax", *controls)]
    for timestep, base in errors["softmax"].items():
        ratios = [errors[name][timestep] / base if base else math.nan for name in controls]
        rows.append((str(timestep), f"{base:.4f}", *(f"{ratio:.2f}×" for ratio in ratios)))
    return rows
