"""Train the embedded teacher: CLIP -> VAE -> cached latents -> UNet -> a diffusers pipeline on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from experiments.config import FitConfig
from experiments.data import EmojiSet
from experiments.data.emoji import BACKGROUNDS, catalogue
from experiments.teacher import networks
from experiments.teacher.objectives import Contrastive, Denoising, Reconstruction
from experiments.teacher.recipe import TeacherRecipe
from experiments.training import batch_indices, fit

Report = Callable[[str, int, int, dict[str, float]], None]


def train_teacher(directory: Path, recipe: TeacherRecipe, report: Report | None = None) -> Path:
    """Train, or go on training, the teacher; returns the folder of the finished pipeline.

    Args:
        directory: `state/` keeps each stage's training state (a killed run goes on from there);
            `pipeline/` receives the result in half precision, with the CLIP for evaluation in
            `pipeline/evaluator`.
        recipe: architectures and settings.
        report: called as (stage, step, steps, losses) after each step.

    Costs about 70 minutes on two CPU cores with the default recipe, 1.5 GB of memory.
    """

    def run(stage: str, module: torch.nn.Module, batch: Callable[[int], object], config: FitConfig) -> None:
        tell = (lambda step, losses: report(stage, step, config.steps, losses)) if report else None
        fit(module, batch, config, directory / "state" / stage, tell)

    torch.manual_seed(0)
    words = networks.tokenizer(captions(), recipe)
    judge, coder, denoiser = networks.clip(words, recipe), networks.vae(recipe), networks.unet(recipe)
    pixels, texts = renders(recipe)

    def pictures(step: int, config: FitConfig) -> tuple[Tensor, Tensor]:
        picked = batch_indices(step, config, len(pixels))
        return picked, pixels[picked].float() / 127.5 - 1

    def pairs(step: int) -> tuple[Tensor, Tensor, Tensor]:
        picked, images = pictures(step, recipe.clip)
        tokens = encode(words, [texts[i] for i in picked.tolist()])
        return images, tokens.input_ids, tokens.attention_mask

    run("vae", Reconstruction(coder), lambda step: pictures(step, recipe.vae)[1], recipe.vae)
    run("clip", Contrastive(judge), pairs, recipe.clip)
    latents, states, blank = cache(coder, judge, words, pixels, texts)

    def noisy(step: int) -> tuple[Tensor, Tensor]:
        picked = batch_indices(step, recipe.unet, len(latents))
        dropped = torch.rand(len(picked)) < recipe.caption_dropout
        return latents[picked], torch.where(dropped[:, None, None], blank, states[picked])

    run("unet", Denoising(denoiser, networks.scheduler()), noisy, recipe.unet)
    return export(directory / "pipeline", words, judge, coder, denoiser)


def captions() -> list[str]:
    """Every caption's words: all emoji names, all backgrounds."""
    return [e.name for e in catalogue()] + [f"{color} background" for color in BACKGROUNDS] * 20


def renders(recipe: TeacherRecipe) -> tuple[Tensor, list[str]]:
    """The training emoji as uint8 (items · variations, 3, s, s), and their captions."""
    data = EmojiSet("train")
    examples = [data.example(i, recipe.image_size, v) for v in range(recipe.variations) for i in range(len(data))]
    pixels = torch.stack([((e.image + 1) * 127.5).round().to(torch.uint8) for e in examples])
    return pixels, [e.caption for e in examples]


def encode(words: CLIPTokenizer, texts: list[str]):  # type: ignore[no-untyped-def]
    """Token ids and masks, padded to the model's length as the pipeline pads them."""
    return words(texts, padding="max_length", truncation=True, return_tensors="pt")


@torch.no_grad()
def cache(
    coder: AutoencoderKL, judge: CLIPModel, words: CLIPTokenizer, pixels: Tensor, texts: list[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled latents (n, 4, s/4, s/4), text states (n, t, d) and the empty caption's states (t, d).

    Sets the autoencoder's `scaling_factor` so that the latents have unit variance.
    """
    coder.eval()
    judge.eval()
    parts = [coder.encode(chunk.float() / 127.5 - 1).latent_dist.mean for chunk in pixels.split(128)]
    latents = torch.cat(parts)
    coder.register_to_config(scaling_factor=float(1 / latents.std()))
    texts = ["", *texts]
    states = [
        judge.text_model(input_ids=encode(words, texts[i : i + 512]).input_ids).last_hidden_state
        for i in range(0, len(texts), 512)
    ]
    joined = torch.cat(states)
    return latents * coder.config.scaling_factor, joined[1:], joined[0]


def export(
    folder: Path, words: CLIPTokenizer, judge: CLIPModel, coder: AutoencoderKL, denoiser: torch.nn.Module
) -> Path:
    """Write the pipeline in diffusers format, half precision, no code of ours needed to load it."""
    from transformers import CLIPTextModel

    text = CLIPTextModel(judge.config.text_config)
    own = text.state_dict().keys()
    tower = judge.text_model.state_dict()
    prefix = "text_model." if any(key.startswith("text_model.") for key in own) else ""
    text.load_state_dict({f"{prefix}{key}": value for key, value in tower.items()})
    pipe = StableDiffusionPipeline(
        vae=coder,
        text_encoder=text,
        tokenizer=words,
        unet=denoiser,
        scheduler=networks.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(folder)
    judge.half().save_pretrained(folder / "evaluator")
    for part in ("text_encoder", "evaluator"):
        _compute_in_float32(folder / part / "config.json")
    return folder


def _compute_in_float32(config: Path) -> None:
    """transformers loads in the dtype that the config names, diffusers in float32: make a plain load of both agree."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(settings | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
