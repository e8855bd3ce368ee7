"""Load a teacher: the embedded one, a local folder or a Hub id, as an unmodified diffusers pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from experiments.core.errors import first_line
from experiments.teacher.teacher import Teacher
from unet_adapters.text_to_image import check_text_to_image

EMBEDDED = Path(__file__).parent / "weights"
_REQUIRED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def open_teacher(source: str = "embedded", dtype: torch.dtype = torch.float32) -> Teacher:
    """Load a teacher for distillation; see `load_teacher`."""
    return Teacher(load_teacher(source, dtype))


def load_teacher(source: str = "embedded", dtype: torch.dtype = torch.float32, variant: str | None = None) -> Any:
    """Load a text-to-image pipeline of Stable Diffusion 1.5, 2.1 or XL on the best available device, frozen and silent.

    The autoencoder is float32 at least, whatever `dtype`: SDXL's overflows in float16, and its latents are encoded once
    and used for the whole training. Use `torch.autocast` to generate images with a pipeline in half precision.

    Args:
        source: `"embedded"`, a folder in diffusers format, or a Hub id.
        dtype: of the UNet and the text encoders.
        variant: the weight files to read, such as "fp16" for `*.fp16.safetensors`; None: those without a variant.

    Raises:
        ValueError: If nothing can be loaded from there, or it is not a text-to-image model.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    path = str(EMBEDDED if source == "embedded" else source)
    try:
        parts = DiffusionPipeline.load_config(path)
        missing = [name for name in _REQUIRED if parts.get(name) in (None, [None, None])]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}, which every text-to-image Stable Diffusion has.")
        unchecked = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in parts else {}
        dtypes = {"default": dtype, "vae": torch.promote_types(dtype, torch.float32)}
        pipe = DiffusionPipeline.from_pretrained(path, dtype=dtypes, variant=variant, **unchecked)
        check_text_to_image(pipe)
    except Exception as error:  # diffusers, transformers, tokenizers, safetensors and the Hub: each has its own
        raise ValueError(f"Cannot load the teacher {source!r}: {first_line(error)} {_advice(path, variant)}") from error
    pipe.set_progress_bar_config(disable=True)
    for network in pipe.components.values():
        if isinstance(network, torch.nn.Module):
            network.requires_grad_(False).eval()
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def _advice(path: str, variant: str | None) -> str:
    """Say what to pass instead; names the variants that a folder has, if it has no other weights."""
    names = [file.name for file in Path(path).glob("unet/*.safetensors")]
    variants = sorted({name.split(".")[1] for name in names if name.count(".") == 2})
    if variants and variant not in variants and not any(name.count(".") == 1 for name in names):
        return f"The folder has only weights of the variant {', '.join(variants)}: pass --variant {variants[0]}."
    return "Expected 'embedded', a folder in diffusers format, or a Hub id that can be reached."
