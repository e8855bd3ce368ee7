"""The teacher's networks, all of them plain transformers and diffusers classes."""

from __future__ import annotations

import json
from collections.abc import Iterable

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from experiments.teacher.recipe import TeacherRecipe

_END_OF_WORD = "</w>"
_START, _END = "<|startoftext|>", "<|endoftext|>"


def tokenizer(captions: Iterable[str], recipe: TeacherRecipe) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learned from the captions."""
    learner = Tokenizer(models.BPE(end_of_word_suffix=_END_OF_WORD))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix=_END_OF_WORD,
        special_tokens=[_START, _END],
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary: dict[str, int] = dict(learned["vocab"])
    # CLIP's tokenizer closes every word, so each single character needs its closed twin.
    for char in pre_tokenizers.ByteLevel.alphabet():
        vocabulary.setdefault(char + _END_OF_WORD, len(vocabulary))
    merges = [tuple(m) for m in learned["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=recipe.max_tokens)


def clip(words: CLIPTokenizer, recipe: TeacherRecipe) -> CLIPModel:
    """A small CLIP: the text tower conditions the UNet, the vision tower judges the samples."""
    width, heads = recipe.clip_width, 4
    shared = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "projection_dim": width,
    }
    text = {
        **shared,
        "num_hidden_layers": recipe.clip_layers,
        "vocab_size": len(words),
        "max_position_embeddings": recipe.max_tokens,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    vision = {**shared, "num_hidden_layers": recipe.clip_layers + 1, "image_size": recipe.image_size, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def vae(recipe: TeacherRecipe) -> AutoencoderKL:
    """An autoencoder with a down-sampling factor of 4 and 4 latent channels (3 levels)."""
    levels = len(recipe.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=recipe.image_size,
    )


def unet(recipe: TeacherRecipe) -> UNet2DConditionModel:
    """A UNet with self- and cross-attention at 16 × 16 and 8 × 8 latents (for 64 px images)."""
    levels = len(recipe.unet_channels)
    return UNet2DConditionModel(
        sample_size=recipe.image_size // 4,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=recipe.unet_channels,
        layers_per_block=1,
        cross_attention_dim=recipe.clip_width,
        attention_head_dim=recipe.unet_heads,  # diffusers' name; it is the number of heads
        norm_num_groups=8,
    )


def scheduler() -> DDIMScheduler:
    """DDIM on velocities with zero terminal signal, so that a plain background's color can start from noise alone."""
    return DDIMScheduler(
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
