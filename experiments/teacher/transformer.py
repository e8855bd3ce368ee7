"""The second embedded teacher: a tiny PixArt, in which self-attention alone mixes tokens.

    latents, captions of the UNet's training  ->  the UNet's velocity  ->  the transformer learns to predict it

It shares the autoencoder, the text encoder and the noise schedule with the UNet. Learning from the UNet's predictions
instead of single noise draws needs fewer images; it also means that the transformer draws at best as well as the UNet.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from experiments.teacher import networks
from experiments.teacher.export import load_averaged, load_trained
from experiments.teacher.judge import attention_mask
from experiments.teacher.objectives import JointDenoising, add_random_noise
from experiments.teacher.recipe import TeacherRecipe
from experiments.teacher.state import fit_stage, require_same_state
from experiments.teacher.train import unet_batches
from experiments.training import LossCallback

FOLDER = "transformer"
PIPELINE_TOKENS = 300  # to which PixArtSigmaPipeline pads captions


class Imitation(nn.Module):
    """Squared difference of the transformer's velocity to the UNet's.

    Batch: latents (b, c, s, s), scaled; token ids (b, t).

    Args:
        transformer: the network that is trained.
        teacher: UNet and text encoder; frozen.
        words: the tokenizer, for the padding mask.
        focus: of the timesteps, as `Denoising` takes it.
    """

    def __init__(
        self, transformer: PixArtTransformer2DModel, teacher: JointDenoising, words: CLIPTokenizer, focus: float = 0.0
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.teacher = teacher.requires_grad_(False).eval()
        self.words = words
        self.focus = focus

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        latents, tokens = batch
        noisy, steps, truth = add_random_noise(latents, self.teacher.schedule, self.focus)
        with torch.no_grad():
            states = self.teacher.text(input_ids=tokens).last_hidden_state
            target = self.teacher.unet(noisy, steps, states).sample.float()
        predicted = self.transformer(
            noisy,
            encoder_hidden_states=states,
            encoder_attention_mask=attention_mask(tokens, self.words),
            timestep=steps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample.float()
        return {
            "loss": (predicted - target).square().mean(),
            "to_truth": (predicted.detach() - truth).square().mean(),
            "teacher_to_truth": (target - truth).square().mean(),
        }


def train_transformer(
    directory: Path, recipe: TeacherRecipe, callback: LossCallback | None = None, *, stage: str = "decay"
) -> Imitation:
    """Train the transformer, or resume; its state is in `directory / "transformer"`.

    Args:
        directory: the state, with a trained UNet.
        recipe: architectures and settings.
        callback: called after each step.
        stage: the folder of the UNet's training that is imitated, `"unet"` or `"decay"`.

    Raises:
        Interrupted: SIGTERM. The same call resumes.
        FileNotFoundError: there is no trained UNet.
        ValueError: the state is of another recipe, or another training of the transformer is running in it.
    """
    require_same_state(directory, recipe, ("dit",))
    pipe, _ = load_trained(directory, recipe, stage)
    torch.manual_seed(0)
    teacher = JointDenoising(pipe.unet, pipe.text_encoder, networks.noise_schedule())
    model = Imitation(networks.transformer(recipe), teacher, pipe.tokenizer, recipe.timestep_focus)
    settings = recipe.model_copy(update={"unet": recipe.dit, "large_from": recipe.dit_large_from})
    batch = unet_batches(directory, pipe.vae, pipe.tokenizer, settings)
    fit_stage(model, batch, recipe.dit, directory / FOLDER, callback)
    return model


def load_trained_transformer(directory: Path, recipe: TeacherRecipe) -> tuple[PixArtSigmaPipeline, int]:
    """Return the transformer of a training state as a pipeline, in float32, with averaged weights; and its step."""
    pipe, _ = load_trained(directory, recipe, "decay")
    transformer = networks.transformer(recipe)
    step = load_averaged(directory / FOLDER, nn.ModuleDict({"transformer": transformer}))
    return assemble_transformer(pipe.tokenizer, pipe.vae, pipe.text_encoder, transformer), step


def assemble_transformer(
    words: CLIPTokenizer, coder: AutoencoderKL, text: CLIPTextModel, transformer: PixArtTransformer2DModel
) -> PixArtSigmaPipeline:
    """Return the networks as a pipeline that needs no code of this project."""
    pipe = PixArtSigmaPipeline(
        tokenizer=words,
        text_encoder=with_positions(text, PIPELINE_TOKENS),
        vae=coder,
        transformer=transformer,
        scheduler=networks.sampler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_positions(text: CLIPTextModel, count: int) -> CLIPTextModel:
    """Return the text encoder with `count` positions; the new ones repeat the last and hold padding alone.

    Attention is causal, so that the states of the tokens before them are those of the original.
    """
    config = copy.deepcopy(text.config)
    config.max_position_embeddings = count
    longer = CLIPTextModel(config).eval()
    state = text.state_dict()
    name = next(key for key in state if key.endswith("position_embedding.weight"))
    last = state[name][-1:].expand(count - len(state[name]), -1)
    longer.load_state_dict(state | {name: torch.cat([state[name], last])})
    return longer.to(text.dtype)
