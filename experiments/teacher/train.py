"""Train the embedded teacher: autoencoder -> its decoder -> latents -> UNet with text encoder -> judge."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTokenizer

from experiments.config import FitConfig
from experiments.core.devices import check_device
from experiments.core.files import save_folder
from experiments.data import SceneSet
from experiments.data.emoji import BACKGROUNDS
from experiments.data.scenes.catalogue import SHAPE_COLORS, SHAPES, load_drawings
from experiments.data.scenes.words import NUMBERS, pluralize
from experiments.teacher import networks
from experiments.teacher.judge import train_judge
from experiments.teacher.objectives import JointDenoising, Reconstruction
from experiments.teacher.recipe import TeacherRecipe
from experiments.teacher.shards import LatentShards, encode_captions, encode_images, make_batches
from experiments.teacher.state import fit_stage, lock_stage, require_same_state, save_once
from experiments.training import StageCallback, batch_indices, fit
from experiments.training.processes import this_process

STAGES = ("decoder", "judge", "unet")


def train_teacher(
    directory: Path,
    recipe: TeacherRecipe,
    report: StageCallback | None = None,
    *,
    device: str = "cpu",
    seconds: float | None = None,
    stages: tuple[str, ...] = STAGES,
) -> None:
    """Train every network, or resume; each stage keeps its state in a folder of `directory`.

    The UNet comes last, since its training is open-ended; `experiments.teacher.export` makes a pipeline of the state.

    Args:
        directory: the state.
        recipe: architectures and settings.
        report: called as (stage, step, steps, losses) after each step.
        device: of the UNet's training, `"cpu"` or `"cuda"`.
        seconds: wall-clock budget of the UNet in this call.
        stages: those of `STAGES` to train; the encoder is trained if there is none.

    Raises:
        Interrupted: SIGTERM, or the budget is spent. The same call resumes.
        ValueError: there is no such stage or device; the state is of another recipe, or another training of a stage
            is running in it.
    """
    check_device(device)
    unknown = sorted(set(stages) - set(STAGES))
    if unknown:
        raise ValueError(f"Unknown stage {', '.join(unknown)}: expected some of {', '.join(STAGES)}.")
    require_same_state(directory, recipe, stages)
    coder = open_encoder(directory, recipe, report)
    if "decoder" in stages:
        train_decoder(coder, directory, recipe, report)
    if "judge" in stages:
        train_judge(directory, open_tokenizer(directory, recipe), recipe, report)
    if "unet" in stages:
        train_unet(directory, coder, recipe, report, device=device, seconds=seconds)


def open_encoder(directory: Path, recipe: TeacherRecipe, report: StageCallback | None = None) -> AutoencoderKL:
    """Return the autoencoder of the first stage, trained if `directory / "encoder"` does not exist."""
    folder = directory / "encoder"
    if not folder.exists():
        with lock_stage(directory / "vae"):
            save_once(folder, train_autoencoder(directory, recipe, report).save_pretrained)
    return AutoencoderKL.from_pretrained(folder).eval()


def open_tokenizer(directory: Path, recipe: TeacherRecipe) -> CLIPTokenizer:
    """Return the tokenizer of a training, from `directory / "tokenizer"`; trained and saved there the first time.

    Merges of equal frequency get their numbers in another order in every process, so a training keeps one file.
    """
    folder = directory / "tokenizer"
    process = this_process()
    if process.is_main_process and not folder.exists():
        save_folder(folder, networks.tokenizer(caption_words(), recipe).save_pretrained)
    process.wait_for_everyone()
    return CLIPTokenizer.from_pretrained(folder, model_max_length=recipe.max_tokens)


def caption_words() -> list[str]:
    """Return texts that hold every word of a caption, from which the tokenizer learns its vocabulary."""
    names = [drawing.name for drawing in load_drawings(others=True)]
    shapes = [f"{color} {shape}" for color in SHAPE_COLORS for shape in SHAPES]
    phrases = [
        "of the same, of one color, a repeated pattern, alternating rows, alternating columns, a checkerboard of two",
        "mirrored left and right, mirrored top and bottom, to the left of, above, and, an, many, background, shapes",
        ", ".join(NUMBERS),
        *(f"{name} background" for name in BACKGROUNDS),
    ]
    return [*names, *map(pluralize, names), *shapes, *map(pluralize, shapes), *phrases * 8]


def render_images(recipe: TeacherRecipe, count: int, first_variation: int = 1000) -> Tensor:
    """Return random training scenes as uint8 (count, 3, s, s)."""
    data = SceneSet("train")
    draw = torch.Generator().manual_seed(first_variation)
    indices = torch.randint(0, len(data), (count,), generator=draw).tolist()
    images = (data.example(i, recipe.image_size, first_variation + k).image for k, i in enumerate(indices))
    return torch.stack([((image + 1) * 127.5).round().to(torch.uint8) for image in images])


def train_autoencoder(directory: Path, recipe: TeacherRecipe, report: StageCallback | None = None) -> AutoencoderKL:
    """Train the autoencoder on crops, or resume its training; sets its `scaling_factor` from scenes."""
    torch.manual_seed(0)
    coder = networks.vae(recipe)
    images = render_images(recipe, 5000 if recipe.vae.steps > 100 else 64)
    slack = recipe.image_size - recipe.vae_crop

    def crops(step: int) -> Tensor:
        rows = batch_indices(step, recipe.vae, len(images)).tolist()
        corners = torch.randint(0, slack + 1, (len(rows), 2)).tolist()
        side = recipe.vae_crop
        parts = [images[i, :, y : y + side, x : x + side] for i, (y, x) in zip(rows, corners, strict=True)]
        return torch.stack(parts).float() / 127.5 - 1

    model = Reconstruction(coder, recipe.latent_smoothness)
    fit(model, crops, recipe.vae, directory / "vae", stage_callback(report, "vae", recipe.vae))
    coder.eval()
    coder.register_to_config(scaling_factor=1.0)
    latents = torch.cat([encode_images(coder, chunk.float() / 127.5 - 1) for chunk in images[:512].split(64)])
    coder.register_to_config(scaling_factor=float(1 / latents.std()))
    return coder


def train_decoder(
    coder: AutoencoderKL, directory: Path, recipe: TeacherRecipe, report: StageCallback | None = None
) -> AutoencoderKL:
    """Train the decoder on whole images while the encoder, and so every cached latent, stays as it is."""
    freeze_encoder(coder)
    images = render_images(recipe, 5000 if recipe.decoder.steps > 100 else 64, first_variation=50_000)

    def batch(step: int) -> Tensor:
        return images[batch_indices(step, recipe.decoder, len(images))].float() / 127.5 - 1

    callback = stage_callback(report, "decoder", recipe.decoder)
    fit_stage(Reconstruction(coder), batch, recipe.decoder, directory / "decoder", callback)
    return coder.eval()


def freeze_encoder(coder: AutoencoderKL) -> None:
    """Exclude what makes latents from training."""
    coder.encoder.requires_grad_(False)
    coder.quant_conv.requires_grad_(False)


def train_unet(
    directory: Path,
    coder: AutoencoderKL,
    recipe: TeacherRecipe,
    report: StageCallback | None = None,
    *,
    device: str = "cpu",
    seconds: float | None = None,
) -> JointDenoising:
    """Train the UNet and its text encoder, or resume; returns them with the averaged weights.

    Args:
        directory: holds the latents and the training state, which is saved on SIGTERM.
        coder: the autoencoder, whose encoder is final.
        recipe: architectures and settings.
        report: called as (stage, step, steps, losses) after each step.
        device: `"cpu"` or `"cuda"`.
        seconds: wall-clock budget of this session; it ends as with SIGTERM.

    Raises:
        Interrupted: SIGTERM, or the budget is spent. The same call resumes.
    """
    words = open_tokenizer(directory, recipe)
    model = build_denoiser(words, recipe).to(device)
    batch = unet_batches(directory, coder, words, recipe, device)
    step_report = stage_callback(report, "unet", recipe.unet)
    deadline = time.monotonic() + (seconds or float("inf"))

    def watch(step: int, losses: dict[str, float]) -> None:
        if step_report:
            step_report(step, losses)
        if time.monotonic() > deadline:
            os.kill(os.getpid(), signal.SIGTERM)

    fit_stage(model, batch, recipe.unet, directory / "unet", watch)
    return model


def build_denoiser(words: CLIPTokenizer, recipe: TeacherRecipe, seed: int = 0) -> JointDenoising:
    """Return an untrained UNet with its text encoder, in the form that trains fastest on a CPU."""
    torch.manual_seed(seed)
    text = networks.text_encoder(words, recipe)
    model = JointDenoising(networks.unet(recipe), text, networks.noise_schedule(), recipe.timestep_focus)
    if not torch.cuda.is_available():
        model.unet.set_attn_processor(AttnProcessor())  # Fused attention's backward pass is twice as slow on CPUs.
    return model


def unet_batches(
    directory: Path, coder: AutoencoderKL, words: CLIPTokenizer, recipe: TeacherRecipe, device: str = "cpu"
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return the function from a step to its batch of latents and token ids, on `device`."""

    def size(step: int) -> int:
        if step < recipe.large_from or step % 10 != 9 or not recipe.large_sizes:
            return recipe.image_size
        return recipe.large_sizes[(step // 10) % len(recipe.large_sizes)]

    load = make_batches(
        LatentShards(directory / "latents", coder, words, recipe.shard),
        encode_captions(words, [""])[0],
        batch_size=recipe.unet.batch_size,
        count=recipe.shards,
        dropout=recipe.caption_dropout,
        large=size,
    )

    def batch(step: int) -> tuple[Tensor, Tensor]:
        latents, tokens = load(step)
        return latents.to(device), tokens.to(device)

    return batch


def stage_callback(
    report: StageCallback | None, stage: str, config: FitConfig
) -> Callable[[int, dict[str, float]], None] | None:
    """Return `report` for one stage, as `fit` calls it."""
    return (lambda step, losses: report(stage, step, config.steps, losses)) if report else None
