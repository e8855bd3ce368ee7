"""From an exported pipeline back to a training state, so that a teacher whose state is lost can be trained further."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from experiments.config import FitConfig
from experiments.core.files import save_folder, write_json
from experiments.teacher import networks
from experiments.teacher.objectives import Contrastive, JointDenoising, Reconstruction
from experiments.teacher.recipe import TeacherRecipe
from experiments.teacher.state import RUN
from experiments.teacher.train import freeze_encoder
from experiments.training import save_weights


def restore_state(directory: Path, export: Path, recipe: TeacherRecipe) -> int:
    """Make a training state of a pipeline that `export_state` wrote; returns the step at which training continues.

    The autoencoder and the judge are complete. The UNet and its text encoder continue with the exported weights, which
    are averaged and in half precision, and with an optimizer without moments, so the loss rises at first.

    Args:
        directory: receives the state; it must not exist.
        export: the pipeline's folder, with the judge in `evaluator/`.
        recipe: of the state.

    Raises:
        ValueError: `directory` exists, or `export` is no such pipeline or one of another architecture.
    """
    if directory.exists():
        raise ValueError(f"Cannot restore a state in {directory}: it exists. Give another --state, or delete it.")
    history = _read_history(export)
    step = int(history["step"])
    coder = AutoencoderKL.from_pretrained(export / "vae")
    words = CLIPTokenizer.from_pretrained(export / "tokenizer")
    text = CLIPTextModel.from_pretrained(export / "text_encoder")
    unet = UNet2DConditionModel.from_pretrained(export / "unet")
    judge = CLIPModel.from_pretrained(export / "evaluator")
    expected = {
        "vae": networks.vae(recipe),
        "text_encoder": networks.text_encoder(words, recipe),
        "unet": networks.unet(recipe),
        "evaluator": networks.judge(words, recipe),
    }
    for name, network in {"vae": coder, "text_encoder": text, "unet": unet, "evaluator": judge}.items():
        _check_architecture(export / name, network, expected[name])

    def save(folder: Path) -> None:
        coder.save_pretrained(folder / "encoder")
        words.save_pretrained(folder / "tokenizer")
        freeze_encoder(coder)
        _save(folder / "decoder", Reconstruction(coder), recipe.decoder, recipe.decoder.steps)
        _save(folder / "judge", Contrastive(judge), recipe.judge, recipe.judge.steps)
        denoiser = JointDenoising(unet, text, networks.noise_schedule(), recipe.timestep_focus)
        _save(folder / "unet", denoiser, recipe.unet, step, 3600 * float(history["hours"]))
        write_json(folder / RUN, recipe.identity())

    save_folder(directory, save)
    return step


def _save(folder: Path, model: nn.Module, config: FitConfig, step: int, seconds: float = 0.0) -> None:
    folder.mkdir(parents=True)
    save_weights(folder, model.float(), config, step, seconds)


def _read_history(export: Path) -> dict[str, float]:
    path = export / "training.json"
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(history[name]) for name in ("step", "hours")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Cannot restore a state from {export}: {path.name} is missing or damaged ({type(error).__name__}). Give a "
            "folder that `mixlab teacher export` wrote."
        ) from error


def _check_architecture(folder: Path, network: nn.Module, expected: nn.Module) -> None:
    def shapes(module: nn.Module) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in module.named_parameters()}

    if shapes(network) != shapes(expected):
        raise ValueError(f"Cannot restore a state from {folder}: it has another architecture than the recipe.")
