"""Latents of scenes on disk, in shards that are pure functions of their number and are written when first needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from experiments.data import SceneSet
from experiments.data.scenes.dataset import Growth
from unet_adapters.files import save_tensors

Shard = dict[str, Tensor]
"""latents (n, c, h, w) float16, scaled; tokens (n, t) int32."""


@dataclass
class LatentShards:
    """Cached latents of training scenes.

    Attributes:
        folder: receives one file per shard.
        coder: the autoencoder, with its `scaling_factor` set.
        words: the tokenizer.
        scenes: per shard of images of 64 px; larger images have fewer, in inverse proportion to their area.
    """

    folder: Path
    coder: AutoencoderKL
    words: CLIPTokenizer
    scenes: int

    def __post_init__(self) -> None:
        self._loaded: dict[tuple[int, int], Shard] = {}

    def load(self, number: int, size: int = 64) -> Shard:
        """Return a shard; it is rendered and encoded if its file does not exist."""
        key = (number, size)
        if key not in self._loaded:
            path = self.folder / f"{size}-{number:04d}.safetensors"
            if not path.exists():
                self._write(path, number, size)
            self._loaded = {k: v for k, v in self._loaded.items() if k[1] != size}  # one per size stays in memory
            self._loaded[key] = safetensors.torch.load_file(path)
        return self._loaded[key]

    def _write(self, path: Path, number: int, size: int) -> None:
        count = max(1, round(self.scenes * (64 / size) ** 2))
        growths: tuple[Growth, ...] = ("larger",) if size == 64 else ("larger", "more")
        sets = [SceneSet("train", growth) for growth in growths]
        draw = torch.Generator().manual_seed(number * 1009 + size)
        indices = torch.randint(0, len(sets[0]), (count,), generator=draw).tolist()
        latents = []
        captions = []
        for start in range(0, count, 64):
            chunk = range(start, min(start + 64, count))
            examples = [sets[k % len(sets)].example(indices[k], size, number * 1_000_000 + k) for k in chunk]
            with torch.autocast(self.coder.device.type, torch.bfloat16):  # three times as fast on a CPU
                latents.append(encode_images(self.coder, torch.stack([e.image for e in examples])).half())
            captions += [e.caption for e in examples]
        tokens = encode_captions(self.words, captions).int()
        save_tensors(path, {"latents": torch.cat(latents), "tokens": tokens})


@torch.no_grad()
def encode_images(coder: AutoencoderKL, images: Tensor) -> Tensor:
    """Return the scaled posterior means (b, c, h, w) of images (b, 3, 4h, 4w) in [-1, 1]."""
    means = coder.encode(images.to(coder.device)).latent_dist.mean
    return (means * coder.config.scaling_factor).float().cpu()


def encode_captions(words: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return token ids (b, t), padded to the model's length as the pipeline pads them."""
    ids: Tensor = words(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


def make_batches(
    shards: LatentShards, blank: Tensor, *, batch_size: int, count: int, dropout: float, large: Callable[[int], int]
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return the function from a step to its batch: latents (b, c, h, w) and token ids (b, t).

    Each shard serves one pass of its scenes, then comes the next one, in a cycle of `count` shards.

    Args:
        shards: the cache.
        blank: token ids (t,) of the empty caption.
        batch_size: of images of 64 px; larger images come in smaller batches, of about as many tokens.
        count: shards in a cycle.
        dropout: share of the captions that are replaced by the empty one.
        large: step -> the size of its images in pixels.
    """
    part = math.gcd(batch_size, 4)  # so that two or four processes can divide batches of every size

    def batch(step: int) -> tuple[Tensor, Tensor]:
        size = large(step)
        shard = shards.load((step * batch_size // shards.scenes) % count, size)
        items = part * max(1, round(batch_size * (64 / size) ** 2 / part))
        indices = torch.randint(0, len(shard["latents"]), (items,))
        tokens = shard["tokens"][indices].long()
        dropped = torch.rand(items) < dropout
        return shard["latents"][indices].float(), torch.where(dropped[:, None], blank, tokens)

    return batch
