"""What is measured: agreement of edges, likeness to a picture, their intervals, and that unmounting leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from pydantic import Field
from torch import Tensor
from transformers import CLIPModel

from experiments.config import FrozenModel
from experiments.data import batch, open_dataset
from experiments.studies.compatibility import ip_adapter as ip
from experiments.studies.compatibility.controlnet import edges
from unet_adapters import MixerAdapter

VARIATION = 100_000  # a background, place and scale that no training drew
CHUNK = 16  # pictures a call


class Sampling(FrozenModel):
    """What is drawn and how: the same seeds and sampler for all."""

    pictures: int = Field(32, gt=0, description="of each split")
    sizes: tuple[int, ...] = Field((64, 128), description="for the ControlNet; the IP-Adapter draws the first alone")
    steps: int = Field(12, gt=0)
    guidance: float = Field(3.0, gt=1)
    seed: int = 0


@dataclass(frozen=True)
class Scene:
    """Real pictures (n, 3, size, size) of a split, to be drawn again from their captions, edges or embeddings."""

    split: str
    size: int
    images: Tensor
    captions: list[str]


def scene(data: str, split: str, size: int, pictures: int) -> Scene:
    """`pictures` items spread over the split, the same at every size, each where no training saw it."""
    items = open_dataset(data, split=split)
    indices = torch.linspace(0, len(items) - 1, pictures).long().tolist()
    images, captions = batch(items, indices, size, [VARIATION] * pictures)
    return Scene(split, size, images, captions)


def f1(found: Tensor, wanted: Tensor, tolerance: int = 1) -> Tensor:
    """Agreement of edge maps (b, 1, h, w): the harmonic mean of precision and recall, each picture's (b,).

    A found edge is right if a wanted one is within `tolerance` pixels (in each direction), and a
    wanted one is met likewise. Two maps without edges agree (1), one against none does not (0).
    """
    side = 2 * tolerance + 1
    near_found, near_wanted = (F.max_pool2d(m, side, stride=1, padding=tolerance) for m in (found, wanted))
    total_found, total_wanted = found.sum((1, 2, 3)), wanted.sum((1, 2, 3))
    precision = (found * near_wanted).sum((1, 2, 3)) / total_found.clamp(min=1)
    recall = (wanted * near_found).sum((1, 2, 3)) / total_wanted.clamp(min=1)
    score = 2 * precision * recall / (precision + recall).clamp(min=1e-9)
    return torch.where((total_found == 0) & (total_wanted == 0), torch.ones_like(score), score)


def agreement(pictures: Tensor, wanted: Tensor) -> list[float]:
    """F1 of the edges of pictures (n, 3, s, s) in [-1, 1] against edge maps."""
    return f1(edges(pictures), wanted).tolist()


def likeness(judge: CLIPModel, pictures: Tensor, references: Tensor) -> list[float]:
    """Cosine of the CLIP embeddings of pictures and references, each pair's."""
    return F.cosine_similarity(ip.embed(judge, pictures), ip.embed(judge, references)).tolist()


def interval(values: list[float], draws: int = 10_000) -> dict[str, float]:
    """Mean, and its 95 % bootstrap interval over pictures (percentiles; the resampling is seeded)."""
    sample = np.asarray(values, dtype=np.float64)
    picked = np.random.default_rng(0).integers(len(sample), size=(draws, len(sample)))
    low, high = np.percentile(sample[picked].mean(axis=1), [2.5, 97.5])
    return {"mean": float(sample.mean()), "low": float(low), "high": float(high)}


def difference(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """`interval` of the paired difference, picture by picture."""
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])


@torch.no_grad()
def encoded_and_decoded(pipe: StableDiffusionPipeline, images: Tensor) -> Tensor:
    """The truth as the autoencoder can give it back: what no generated picture can be expected to beat."""
    parts = [pipe.vae.decode(pipe.vae.encode(x.to(pipe.device)).latent_dist.mean).sample for x in images.split(CHUNK)]
    return torch.cat(parts).clamp(-1, 1).cpu()


def controlled(pipe: StableDiffusionPipeline, controlnet: ControlNetModel) -> StableDiffusionControlNetPipeline:
    """diffusers' ControlNet pipeline on the very same networks."""
    parts = {**pipe.components, "controlnet": controlnet}
    made = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


Extras = Callable[[slice], dict[str, Any]]


@torch.no_grad()
def draw(
    pipe: Any, captions: list[str], size: int, config: Sampling, extras: Extras | None = None, chunk: int = CHUNK
) -> Tensor:
    """One picture a caption, seed + k for caption k: (n, 3, size, size) in [-1, 1], of 8-bit colors.

    Args:
        pipe: a text-to-image or ControlNet pipeline.
        extras: which pictures -> further arguments of the call, for those pictures.
        chunk: pictures a call.
    """
    parts = []
    for start in range(0, len(captions), chunk):
        part = slice(start, min(start + chunk, len(captions)))
        noise = [torch.Generator().manual_seed(config.seed + k) for k in range(part.start, part.stop)]
        options = {"height": size, "width": size, "num_inference_steps": config.steps}
        further = extras(part) if extras else {}
        images = pipe(
            captions[part],
            guidance_scale=config.guidance,
            generator=noise,
            output_type="pt",
            **options,
            **further,
        ).images
        parts.append((images.cpu().float() * 255).round() / 127.5 - 1)
    return torch.cat(parts)


def edge_extras(wanted: Tensor) -> Extras:
    """The ControlNet pipeline's arguments for edge maps (n, 1, h, w)."""
    return lambda part: {"image": wanted[part].expand(-1, 3, -1, -1)}


def picture_extras(embeddings: Tensor) -> Extras:
    """A pipeline's arguments for image embeddings (n, d); the unguided half of a call sees zeros, as in training.

    For calls of one picture only: diffusers repeats what it is given for every prompt of a call, and
    would show each of several prompts all of several pictures, silently.
    """

    def make(part: slice) -> dict[str, Any]:
        wanted = embeddings[part, None]
        if len(wanted) != 1:
            raise ValueError(f"An IP-Adapter call draws from one picture, not {len(wanted)}: draw with chunk=1.")
        return {"ip_adapter_image_embeds": [torch.cat([torch.zeros_like(wanted), wanted])]}

    return make


def leaves_no_trace(
    pipe: StableDiffusionPipeline,
    adapter: MixerAdapter,
    controlnet: ControlNetModel,
    weights: ip.StateDict,
    judge: CLIPModel,
    real: Scene,
) -> dict[str, bool]:
    """Whether latents sampled with both parts are the stock ones again, bitwise, after unmounting and unloading."""
    one = slice(0, 1)
    guided, first = controlled(pipe, controlnet), real.images[one]
    both = edge_extras(edges(first))(one) | picture_extras(ip.embed(judge, first))(one)

    @torch.no_grad()
    def latents(pipeline: Any, **extras: Any) -> Tensor:
        noise = [torch.Generator().manual_seed(k) for k in range(len(first))]
        options = {"height": real.size, "width": real.size, "num_inference_steps": 3, "output_type": "latent"}
        return pipeline(real.captions[one], generator=noise, **options, **extras).images

    stock = latents(pipe)
    with ip.loaded(pipe, weights):
        before = latents(guided, **both)
        with adapter.mounted():
            under = latents(guided, **both)
        after = latents(guided, **both)
    return {
        "mounting changes the result": not torch.equal(before, under),
        "unmounting gives the stock result again, with ControlNet and IP-Adapter loaded": torch.equal(before, after),
        "unloading the IP-Adapter as well gives the plain teacher's result again": torch.equal(stock, latents(pipe)),
    }
