"""From a training state to a pipeline in diffusers format."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from transformers import CLIPModel, CLIPTokenizer

from experiments.teacher import networks
from experiments.teacher.objectives import JointDenoising
from experiments.teacher.recipe import TeacherRecipe
from experiments.teacher.state import checkpoint_step, newest_checkpoint
from experiments.teacher.train import build_denoiser, open_tokenizer
from experiments.training import training_seconds


def load_averaged(directory: Path, model: torch.nn.Module) -> int:
    """Copy the averaged weights of the newest checkpoint into `model`; returns the checkpoint's step."""
    path = newest_checkpoint(directory)
    tensors = safetensors.torch.load_file(path)
    parameters = dict(model.named_parameters())
    prefix = "ema/" if any(key.startswith("ema/") for key in tensors) else "model/"
    with torch.no_grad():
        for key, value in tensors.items():
            if key.startswith(prefix):
                parameters[key.removeprefix(prefix)].copy_(value)
    return checkpoint_step(path)


def load_trained(directory: Path, recipe: TeacherRecipe, stage: str = "unet") -> tuple[StableDiffusionPipeline, int]:
    """Return the pipeline of a training state, in float32, with averaged weights; and the step it is from.

    Args:
        directory: of the training state: `encoder/`, `decoder/` and `unet/`.
        recipe: architectures.
        stage: the folder of the UNet's training, `"unet"` or `"decay"`.
    """
    words = open_tokenizer(directory, recipe)
    model = build_denoiser(words, recipe)
    step = load_averaged(directory / stage, model)
    coder = AutoencoderKL.from_pretrained(directory / "encoder")
    if (directory / "decoder" / "checkpoints").exists():
        load_averaged(directory / "decoder", torch.nn.ModuleDict({"vae": coder}))
    return assemble(words, coder, model), step


def export_state(folder: Path, directory: Path, recipe: TeacherRecipe, stage: str = "unet") -> Path:
    """Write the newest training state in `directory` as a pipeline with its judge; returns the folder."""
    pipe, step = load_trained(directory, recipe, stage)
    judge = networks.judge(pipe.tokenizer, recipe)
    load_averaged(directory / "judge", torch.nn.ModuleDict({"clip": judge}))
    export_pipeline(folder, pipe, judge)
    seconds = training_seconds(directory / stage)
    history = {"step": step, "hours": round(seconds / 3600, 2)}
    (folder / "training.json").write_text(json.dumps(history, indent=2) + "\n", encoding="utf-8")
    return folder


def assemble(words: CLIPTokenizer, coder: AutoencoderKL, model: JointDenoising) -> StableDiffusionPipeline:
    """Return the networks as a pipeline."""
    model.unet.set_attn_processor(AttnProcessor2_0())
    pipe = StableDiffusionPipeline(
        vae=coder,
        text_encoder=model.text,
        tokenizer=words,
        unet=model.unet,
        scheduler=networks.sampler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export_pipeline(folder: Path, pipe: StableDiffusionPipeline, judge: CLIPModel | None = None) -> Path:
    """Write the pipeline in diffusers format, half precision, and the judge in `evaluator/`; returns the folder.

    No code of this project is needed to load it.
    """
    pipe.to(torch.float16).save_pretrained(folder)
    if judge is not None:
        judge.half().save_pretrained(folder / "evaluator")
    for part in ("text_encoder", "evaluator"):
        if (folder / part).exists():
            _compute_in_float32(folder / part / "config.json")
    return folder


def _compute_in_float32(config: Path) -> None:
    """transformers loads in the dtype that the config names, diffusers in float32: make a plain load of both agree."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(settings | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
