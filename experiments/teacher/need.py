"""How much a denoiser needs its self-attention: velocity errors by timestep with other mixing in its place."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from experiments.data import SceneSet
from experiments.data.scenes.dataset import Growth
from experiments.teacher.mixing import CONTROLS, fix_mixing, fixed_mixing
from experiments.teacher.noise_schedules import create_noise_schedule
from experiments.teacher.recipe import TeacherRecipe
from experiments.teacher.shards import encode_captions, encode_images
from experiments.teacher.train import build_denoiser, unet_batches
from experiments.training import fit

TIMESTEPS = (999, 950, 850, 700, 550, 400, 250, 100, 30)
Errors = dict[int, float]
"""Timestep -> mean squared error of the velocity."""


def encode_scenes(
    pipe: StableDiffusionPipeline, split: str, count: int, size: int = 64, growth: Growth = "larger"
) -> tuple[Tensor, Tensor]:
    """Return scaled latents (n, c, h, w) and token ids (n, t) of scenes that no training step has seen."""
    data = SceneSet(split, growth)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(2))[:count].tolist()
    examples = [data.example(index, size, 8_000_000) for index in order]
    latents = encode_images(pipe.vae, torch.stack([e.image for e in examples]))
    return latents, encode_captions(pipe.tokenizer, [e.caption for e in examples])


@torch.no_grad()
def velocity_errors(
    pipe: StableDiffusionPipeline, latents: Tensor, tokens: Tensor, timesteps: tuple[int, ...] = TIMESTEPS
) -> Errors:
    """Return the mean squared velocity error at each timestep, with the same noise at all of them."""
    schedule = create_noise_schedule(pipe.scheduler)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    states = pipe.text_encoder(tokens).last_hidden_state
    errors: Errors = {}
    for timestep in timesteps:
        total = 0.0
        for rows in torch.arange(len(latents)).split(16):
            steps = torch.full((len(rows),), timestep)
            noisy = schedule.add_noise(latents[rows], noise[rows], steps)
            target = schedule.target(latents[rows], noise[rows], steps)
            total += float((pipe.unet(noisy, steps, states[rows]).sample - target).square().mean()) * len(rows)
        errors[timestep] = total / len(latents)
    return errors


def control_errors(pipe: StableDiffusionPipeline, latents: Tensor, tokens: Tensor) -> dict[str, Errors]:
    """Return the errors of the pipeline's attention ("softmax") and of every control in its place, untrained."""
    result: dict[str, Errors] = {}
    for name in ("softmax", *CONTROLS):
        with nullcontext() if name == "softmax" else fixed_mixing(pipe.unet, name):
            result[name] = velocity_errors(pipe, latents, tokens)
    return result


def train_from_scratch(
    directory: Path,
    coder: AutoencoderKL,
    words: CLIPTokenizer,
    recipe: TeacherRecipe,
    *,
    control: str | None,
    steps: int,
    seed: int = 0,
) -> list[float]:
    """Train a fresh UNet, with self-attention or with a control in its place; returns the loss of every step.

    Two calls that differ in `control` alone see the same batches, noise and initial weights. The weights stay in
    `directory / "unet-<control>"`; the latents are those of `directory / "latents"`.
    """
    model = build_denoiser(words, recipe, seed)
    if control is not None:
        fix_mixing(model.unet, control)
        for name, parameter in model.unet.named_parameters():
            if ".attn1.to_q." in name or ".attn1.to_k." in name:
                parameter.requires_grad_(False)
    config = recipe.unet.model_copy(update={"steps": steps, "seed": seed, "keep": 1, "ema": 0.99, "log_every": 1})
    folder = directory / f"unet-{control or 'softmax'}"
    history = fit(model, unet_batches(directory, coder, words, recipe), config, folder)
    return [record["loss"] for record in history]
