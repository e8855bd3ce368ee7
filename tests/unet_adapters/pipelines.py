"""Tiny diffusers pipelines with random weights, built without a network or a file, and what is loaded into them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    MotionAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from unet_adapters import MixerAdapter

LETTERS = "abcdefghijklmnopqrstuvwxyz"
START = 2 * len(LETTERS)
END = 2 * len(LETTERS) + 1
WORDS = 8  # the width of text states of one encoder
HEIGHT = 16
WIDTH = 24  # of the image in pixels; latents are half of it, and not square
EMBEDS = 6  # the width of an IP-Adapter's image embedding

Extras = dict[str, Any]


def noise(*shape: int, seed: int = 0) -> Tensor:
    """The same normal numbers for the same arguments."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], Any], seed: int = 1) -> Any:
    """`make()` with random weights that depend on the seed alone, in eval mode where it is a module."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        built = make()
    return built.eval() if isinstance(built, nn.Module) else built


def tokenizer() -> CLIPTokenizer:
    """Letters, without merges."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)


def text_encoder(kind: type = CLIPTextModel, width: int = WORDS) -> Any:
    """A tiny text encoder whose states have this width."""
    return kind(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            projection_dim=width,
            bos_token_id=START,
            eos_token_id=END,
            pad_token_id=END,
        )
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=32,
    )


def _unet(words: int, **settings: Any) -> UNet2DConditionModel:
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": words,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        **settings,
    }
    unet = UNet2DConditionModel(**config)
    for name, parameter in unet.named_parameters():  # sharper attention: a mixer must change the output visibly
        if ".attn1.to_" in name:
            parameter.data.mul_(4)
    return unet


def _xl_unet(words: int, ids: int) -> UNet2DConditionModel:
    return _unet(
        words,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * ids + WORDS,
    )


MAKERS: dict[str, Callable[[], Any]] = {
    "tokenizer": tokenizer,
    "text_encoder": text_encoder,
    "text_encoder_2": lambda: text_encoder(CLIPTextModelWithProjection),
    "vae": _vae,
    "unet": lambda: _unet(WORDS),
    "xl unet": lambda: _xl_unet(2 * WORDS, 6),
    "refiner unet": lambda: _xl_unet(WORDS, 5),
    "controlnet": lambda: ControlNetModel.from_unet(component("unet"), conditioning_embedding_out_channels=(8, 8)),
    "t2i adapter": lambda: T2IAdapter(channels=(8, 16), num_res_blocks=1, downscale_factor=2),
    "motion": lambda: MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    ),
    "scheduler": lambda: DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    ),
}


@cache
def _original(name: str) -> Any:
    built = seeded(MAKERS[name])
    if isinstance(built, ControlNetModel):  # its last convolutions start at zero
        for parameter in (p for p in built.parameters() if not p.any()):
            parameter.data.copy_(0.1 * noise(*parameter.shape))
    return built


def component(name: str) -> Any:
    """A fresh copy of one of `MAKERS`."""
    return deepcopy(_original(name))


def _parts(unet: str = "unet", **more: Any) -> dict[str, Any]:
    parts = {name: component(name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    return {**parts, "unet": component(unet), **more}


def _sd(kind: Any = StableDiffusionPipeline, **more: Any) -> DiffusionPipeline:
    return kind(**_parts(**more), safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def _xl(kind: Any = StableDiffusionXLPipeline, **more: Any) -> DiffusionPipeline:
    second = {"text_encoder_2": component("text_encoder_2"), "tokenizer_2": component("tokenizer")}
    return kind(**_parts("xl unet", **second), force_zeros_for_empty_prompt=False, **more)


def _refiner() -> DiffusionPipeline:
    parts = _parts("refiner unet", text_encoder_2=component("text_encoder_2"), tokenizer_2=component("tokenizer"))
    parts |= {"text_encoder": None, "tokenizer": None}
    return StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True)


def _animated() -> DiffusionPipeline:
    parts = {**_parts(), "motion_adapter": component("motion"), "scheduler": component("scheduler")}
    return seeded(lambda: AnimateDiffPipeline(**parts))


def image(channels: int = 3) -> Tensor:
    """An image of the size that `run` makes, between 0 and 1."""
    return noise(1, channels, HEIGHT, WIDTH, seed=3).sigmoid()


SIZE: Extras = {"height": HEIGHT, "width": WIDTH}
IMAGE: Extras = {"strength": 1.0}
PAG: Extras = {**SIZE, "pag_scale": 3.0}

# A pipeline, and what its call takes besides the prompt.
PIPELINES: dict[str, tuple[Callable[[], Any], Callable[[], Extras]]] = {
    "text-to-image": (_sd, lambda: SIZE),
    "img2img": (lambda: _sd(StableDiffusionImg2ImgPipeline), lambda: {**IMAGE, "image": image()}),
    "inpaint": (
        lambda: _sd(StableDiffusionInpaintPipeline),
        lambda: {**SIZE, **IMAGE, "image": image(), "mask_image": image(1).round()},
    ),
    "ControlNet": (
        lambda: _sd(StableDiffusionControlNetPipeline, controlnet=component("controlnet")),
        lambda: {**SIZE, "image": image()},
    ),
    "multi-ControlNet": (
        lambda: _sd(StableDiffusionControlNetPipeline, controlnet=[component("controlnet") for _ in range(2)]),
        lambda: {**SIZE, "image": [image(), 1 - image()], "controlnet_conditioning_scale": [1.0, 0.5]},
    ),
    "T2I-Adapter": (
        lambda: _sd(StableDiffusionAdapterPipeline, adapter=component("t2i adapter")),
        lambda: {**SIZE, "image": image()},
    ),
    "PAG": (lambda: _sd(StableDiffusionPAGPipeline), lambda: PAG),
    "SDXL": (_xl, lambda: SIZE),
    "SDXL PAG": (lambda: _xl(StableDiffusionXLPAGPipeline), lambda: PAG),
    "SDXL refiner": (_refiner, lambda: {**IMAGE, "image": image()}),
    "AnimateDiff": (_animated, lambda: {**SIZE, "num_frames": 3}),
}


def make(name: str = "text-to-image") -> Any:
    """A fresh pipeline, with the same weights each time."""
    pipe = PIPELINES[name][0]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def run(pipe: Any, name: str = "text-to-image", **extras: Any) -> Tensor:
    """Latents after two steps on fixed noise and a fixed prompt."""
    arguments: Extras = {
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        **PIPELINES[name][1](),
        **extras,
    }
    output = pipe("a b c", **arguments)
    built = output.frames if hasattr(output, "frames") else output.images
    return built if isinstance(built, Tensor) else torch.as_tensor(built)


def linfusion(host: Any) -> MixerAdapter:
    """Trained, in effect: all of the student's weights are off their start."""
    adapter: MixerAdapter = seeded(lambda: MixerAdapter.build(host, "linfusion"))
    for seed, parameter in enumerate(adapter.student.parameters()):
        parameter.data.add_(0.1 * noise(*parameter.shape, seed=seed))
    return adapter


def column_scan(host: Any) -> MixerAdapter:
    """A mixer that must know the grid, and has no weights of its own."""
    return MixerAdapter.build(host, "linear_attention", causality="causal", scan="column", train_projections=False)


MIXERS: dict[str, Callable[[Any], MixerAdapter]] = {"linfusion": linfusion, "column scan": column_scan}


def lora_weights(unet: nn.Module, seed: int = 20) -> dict[str, Tensor]:
    """A LoRA of rank 2 on every projection of both kinds of attention, as a file of it would be read."""
    weights = {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            seed += 2
            weights[f"unet.{name}.lora_A.weight"] = noise(2, module.in_features, seed=seed)
            weights[f"unet.{name}.lora_B.weight"] = 0.3 * noise(module.out_features, 2, seed=seed + 1)
    return weights


def ip_adapter_weights(unet: nn.Module) -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter with four image tokens, as a file of it would be read."""
    words: int = unet.config.cross_attention_dim
    weights = {}
    number = 1
    for name in unet.attn_processors:
        if not name.endswith("attn1.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).inner_dim
            for kind in ("k", "v"):
                weights[f"{number}.to_{kind}_ip.weight"] = noise(width, words, seed=number)
            number += 2
    image = {"proj.weight": noise(4 * words, EMBEDS, seed=90), "proj.bias": torch.zeros(4 * words)}
    image |= {"norm.weight": torch.ones(words), "norm.bias": torch.zeros(words)}
    return {"image_proj": image, "ip_adapter": weights}


def load_ip_adapter(pipe: Any) -> None:
    """The adapter above, at full scale."""
    pipe.load_ip_adapter(ip_adapter_weights(pipe.unet), subfolder=None, weight_name=None, image_encoder_folder=None)


def image_prompt() -> Extras:
    """What a call takes once an IP-Adapter is loaded: embeddings without and with the image."""
    embeds = noise(1, 1, EMBEDS, seed=91)
    return {"ip_adapter_image_embeds": [torch.cat([torch.zeros_like(embeds), embeds])]}


@dataclass(frozen=True)
class Change:
    """Something done to a pipeline, how to undo it, what calls take meanwhile, and whether outputs stay the same."""

    do: Callable[[Any], Any]
    undo: Callable[[Any], Any]
    keeps: bool = False
    call: Callable[[], Extras] = dict


def load_lora(pipe: Any, scale: float | None = None) -> None:
    pipe.load_lora_weights(lora_weights(pipe.unet), adapter_name="style")
    if scale is not None:
        pipe.set_adapters("style", scale)


def scaled_ip_adapter(pipe: Any) -> None:
    load_ip_adapter(pipe)
    pipe.set_ip_adapter_scale(0.5)


def tile(pipe: Any) -> None:
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size = 4
    pipe.vae.tile_sample_min_size = 8


def untile(pipe: Any) -> None:
    pipe.vae.disable_slicing()
    pipe.vae.disable_tiling()


def half(scale: float = 0.5) -> Extras:
    return {"cross_attention_kwargs": {"scale": scale}}


def masked() -> Extras:
    return {**image_prompt(), "cross_attention_kwargs": {"ip_adapter_masks": [image(1).round()]}}


CHANGES = {
    "LoRA": Change(load_lora, lambda pipe: pipe.unload_lora_weights()),
    "LoRA at half scale": Change(lambda pipe: load_lora(pipe, 0.5), lambda pipe: pipe.unload_lora_weights()),
    "LoRA scaled in the call": Change(load_lora, lambda pipe: pipe.unload_lora_weights(), call=half),
    "IP-Adapter": Change(load_ip_adapter, lambda pipe: pipe.unload_ip_adapter(), call=image_prompt),
    "IP-Adapter at half scale": Change(scaled_ip_adapter, lambda pipe: pipe.unload_ip_adapter(), call=image_prompt),
    "IP-Adapter with a mask": Change(load_ip_adapter, lambda pipe: pipe.unload_ip_adapter(), call=masked),
    "FreeU": Change(lambda pipe: pipe.enable_freeu(s1=0.5, s2=0.3, b1=1.4, b2=1.6), lambda pipe: pipe.disable_freeu()),
    "attention slicing": Change(
        lambda pipe: pipe.enable_attention_slicing("max"), lambda pipe: pipe.disable_attention_slicing(), keeps=True
    ),
    "default processors": Change(
        lambda pipe: pipe.unet.set_default_attn_processor(),
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0()),
        keeps=True,
    ),
    "VAE slicing and tiling": Change(tile, untile, call=lambda: {"output_type": "np"}),
    "model offload": Change(
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), lambda pipe: pipe.remove_all_hooks(), keeps=True
    ),
    "channels last": Change(
        lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
        lambda pipe: pipe.unet.to(memory_format=torch.contiguous_format),
        keeps=True,
    ),
    "gradient checkpointing": Change(
        lambda pipe: pipe.unet.enable_gradient_checkpointing(),
        lambda pipe: pipe.unet.disable_gradient_checkpointing(),
        keeps=True,
    ),
}
