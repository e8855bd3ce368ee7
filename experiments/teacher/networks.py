"""The teacher's networks, all of them plain transformers and diffusers classes."""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.resnet import ResnetBlock2D
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from experiments.teacher.noise_schedules import DiffusionSchedule
from experiments.teacher.recipe import TeacherRecipe

_END_OF_WORD = "</w>"
_START = "<|startoftext|>"
_END = "<|endoftext|>"


def tokenizer(captions: Iterable[str], recipe: TeacherRecipe) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learned from the captions."""
    learner = Tokenizer(models.BPE(end_of_word_suffix=_END_OF_WORD))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix=_END_OF_WORD,
        special_tokens=[_START, _END],
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary: dict[str, int] = dict(learned["vocab"])
    # The trainer numbers single characters in another order in every run: sort them over their numbers.
    for length in (1, 1 + len(_END_OF_WORD)):
        tokens = sorted(t for t in vocabulary if len(t) == length and (length == 1 or t.endswith(_END_OF_WORD)))
        for token, number in zip(tokens, sorted(vocabulary[token] for token in tokens), strict=True):
            vocabulary[token] = number
    # CLIP's tokenizer closes every word, so each single character needs its closed twin.
    for char in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary.setdefault(char + _END_OF_WORD, len(vocabulary))
    merges = [tuple(m) for m in learned["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=recipe.max_tokens)


def text_encoder(words: CLIPTokenizer, recipe: TeacherRecipe) -> CLIPTextModel:
    """The text encoder that conditions the UNet."""
    return CLIPTextModel(CLIPTextConfig(**_text_settings(words, recipe, recipe.text_width, recipe.text_layers)))


def judge(words: CLIPTokenizer, recipe: TeacherRecipe) -> CLIPModel:
    """A small CLIP that judges samples; it shares no weights with the teacher."""
    width = recipe.judge_width
    vision = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_attention_heads": 3,
        "projection_dim": width,
        "num_hidden_layers": recipe.judge_layers,
        "image_size": recipe.image_size,
        "patch_size": 8,
    }
    text = _text_settings(words, recipe, width, 1)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def _text_settings(words: CLIPTokenizer, recipe: TeacherRecipe, width: int, layers: int) -> dict[str, object]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": max(1, width // 32),
        "projection_dim": width,
        "num_hidden_layers": layers,
        "vocab_size": len(words),
        "max_position_embeddings": recipe.max_tokens,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }


def vae(recipe: TeacherRecipe) -> AutoencoderKL:
    """An autoencoder with a down-sampling factor of 4 (3 levels), without attention."""
    levels = len(recipe.vae_channels)
    coder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        sample_size=recipe.image_size,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        # Posteriors start narrow: with unit variance, an absolute error does not learn to use them.
        coder.quant_conv.bias[recipe.latent_channels :].fill_(-6.0)
        for module in coder.modules():  # Residual branches start at zero, which learns about twice as fast.
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.zero_()
                module.conv2.bias.zero_()
    return coder


def unet(recipe: TeacherRecipe) -> UNet2DConditionModel:
    """A UNet that leaves mixing to attention: one residual block and several transformer layers a block."""
    levels = len(recipe.unet_channels)
    return UNet2DConditionModel(
        sample_size=recipe.image_size // 4,
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=recipe.unet_channels,
        layers_per_block=1,
        transformer_layers_per_block=recipe.unet_transformers,
        cross_attention_dim=recipe.text_width,
        attention_head_dim=recipe.unet_heads,  # diffusers' name; it is the number of heads
        norm_num_groups=recipe.unet_groups,
    )


def transformer(recipe: TeacherRecipe) -> PixArtTransformer2DModel:
    """A PixArt on latent pixels, conditioned on the text encoder's states; only its self-attention mixes tokens."""
    return PixArtTransformer2DModel(
        num_attention_heads=recipe.dit_heads,
        attention_head_dim=recipe.dit_width // recipe.dit_heads,
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        num_layers=recipe.dit_layers,
        cross_attention_dim=recipe.dit_width,
        caption_channels=recipe.text_width,
        sample_size=recipe.image_size // 4,
        patch_size=1,
        interpolation_scale=1,
        use_additional_conditions=False,
    )


def noise_schedule() -> DiffusionSchedule:
    """Velocities with zero terminal signal, so that a plain background's color can start from noise alone."""
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=True,
    )
    return DiffusionSchedule(scheduler.config)


def sampler() -> DPMSolverMultistepScheduler:
    """The scheduler that the pipeline samples with: DPM-Solver++ for the stochastic equation (2211.01095).

    Its fresh noise corrects at every step what a small network predicted wrongly at the steps before (2206.00364, §4):
    the same weights draw recognizable objects about twice as often as with a deterministic sampler.
    """
    return DPMSolverMultistepScheduler.from_config(noise_schedule().config, algorithm_type="sde-dpmsolver++")
