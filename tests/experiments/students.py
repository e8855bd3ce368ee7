"""Tiny teachers, their batches and students, for the tests of distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from experiments.config import FitConfig
from experiments.distill.batches import draw_batch
from experiments.distill.context import EncodedImages
from experiments.teacher.teacher import Batch, Teacher
from tests.unet_adapters.pipelines import make
from unet_adapters import MixerAdapter

FIT = FitConfig(steps=4, batch_size=2, learning_rate=1e-2, warmup=0, checkpoint_every=2, log_every=1)


def open_teacher(kind: str = "text-to-image", dtype: torch.dtype = torch.float64) -> Teacher:
    pipe = make(kind).to(dtype)
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        network.requires_grad_(False)
    return Teacher(pipe)


def encoded(teacher: Teacher, sizes: tuple[int, ...] = (16,), count: int = 4) -> EncodedImages:
    generator = torch.Generator().manual_seed(0)
    by_size = {}
    for size in sizes:
        images = torch.rand(count, 3, size, size + 8, generator=generator) * 2 - 1
        by_size[size] = teacher.encode(images.to(teacher.denoiser.dtype), ["a b", "c", "d e f", "g"][:count])
    return EncodedImages(by_size, teacher.unconditional, source_digest="")


def batch_of(teacher: Teacher, step: int = 0) -> Batch:
    batch = draw_batch(encoded(teacher), step, FIT, teacher.train_timesteps, (16,))
    return {n: v.to(teacher.denoiser.dtype) if n in ("latents", "noise", "rows") else v for n, v in batch.items()}


def student(teacher: Teacher, mixer: str = "linfusion", **options: Any) -> MixerAdapter:
    torch.manual_seed(0)
    adapter = MixerAdapter.build(teacher.pipe, mixer, **options)
    with torch.no_grad():
        for parameter in adapter.student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapter


def gradients(adapter: MixerAdapter, loss: Tensor) -> dict[str, Tensor]:
    adapter.student.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in adapter.student.named_parameters() if p.grad is not None}
