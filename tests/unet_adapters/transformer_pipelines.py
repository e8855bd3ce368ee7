"""Tiny pipelines with a transformer and random weights, built without a network or a file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HunyuanDiTPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
)
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.unet_adapters.host_models import make_model
from tests.unet_adapters.pipelines import LETTERS, seeded, text_encoder, tokenizer

T5_WIDTH = 12  # the widths that the tiny models of host_models.py expect
CLIP_WIDTH = 8


def t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def t5(width: int = T5_WIDTH) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=64, d_model=width, d_kv=6, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
    )


def autoencoder(shift: float | None = None, channels: tuple[int, ...] = (8, 16)) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=4,
        sample_size=32,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )


def pixart() -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=seeded(t5),
        vae=seeded(autoencoder),
        transformer=make_model("PixArt"),
        scheduler=DDIMScheduler(),
    )


def sd3(kind: str = "SD3.5 medium") -> StableDiffusion3Pipeline:
    pooled = partial(text_encoder, CLIPTextModelWithProjection, width=CLIP_WIDTH // 2)
    return StableDiffusion3Pipeline(
        transformer=make_model(kind),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=seeded(partial(autoencoder, 0.06)),
        text_encoder=seeded(pooled),
        tokenizer=tokenizer(),
        text_encoder_2=seeded(pooled, seed=2),
        tokenizer_2=tokenizer(),
        text_encoder_3=seeded(t5),
        tokenizer_3=t5_tokenizer(),
    )


def flux(kind: str = "Flux guidance") -> FluxPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=seeded(partial(autoencoder, 0.1)),
        text_encoder=seeded(partial(text_encoder, CLIPTextModel, width=CLIP_WIDTH)),
        tokenizer=tokenizer(),
        text_encoder_2=seeded(t5),
        tokenizer_2=t5_tokenizer(),
        transformer=make_model(kind),
    )


def bert_tokenizer() -> BertTokenizer:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS]
    return BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})


def bert() -> BertModel:
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=64, max_position_embeddings=77, **sizes))


def hunyuan_dit() -> HunyuanDiTPipeline:
    return HunyuanDiTPipeline(
        vae=seeded(partial(autoencoder, channels=(8,) * 4)),  # the pipeline counts on latents of 8 × 8 pixels
        text_encoder=seeded(bert),
        tokenizer=bert_tokenizer(),
        transformer=make_model("HunyuanDiT"),
        scheduler=DDIMScheduler(prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=seeded(partial(t5, 16)),
        tokenizer_2=t5_tokenizer(),
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "PixArt": pixart,
    "SD3.5 medium": sd3,
    "Flux": flux,
    "HunyuanDiT": hunyuan_dit,
}

PROMPT_TOKENS = {"PixArt": 300, "SD3.5 medium": 16 + 256, "Flux": 512, "HunyuanDiT": 77}
"""Text tokens per prompt: the pipelines pad to these lengths."""
