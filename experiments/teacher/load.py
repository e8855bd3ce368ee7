"""Open a teacher: the embedded one, a local folder or a Hub id, as a plain diffusers pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from experiments.teacher.teacher import Teacher

EMBEDDED = Path(__file__).parent / "weights"
_NEEDED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def open_teacher(source: str = "embedded", dtype: torch.dtype = torch.float32) -> Teacher:
    """`load_teacher`, as distillation sees it."""
    return Teacher(load_teacher(source, dtype))


def load_teacher(source: str = "embedded", dtype: torch.dtype = torch.float32) -> Any:
    """A text-to-image pipeline of Stable Diffusion 1.5, 2.1 or XL on the best device at hand, frozen and silent.

    The autoencoder is float32 at least, whatever `dtype`: SDXL's overflows in float16, and what it encodes once is
    trained on for ever. Pictures are therefore drawn from a pipeline in half precision under `torch.autocast`.

    Args:
        source: `"embedded"`, a folder in diffusers format, or a Hub id.
        dtype: of the UNet and the text encoders.

    Raises:
        ValueError: nothing loadable there; the message says what was tried.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    path = str(EMBEDDED if source == "embedded" else source)
    try:
        parts = DiffusionPipeline.load_config(path)
        missing = [name for name in _NEEDED if name not in parts]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}, which every Stable Diffusion has.")
        unchecked = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in parts else {}
        dtypes = {"default": dtype, "vae": torch.promote_types(dtype, torch.float32)}
        pipe = DiffusionPipeline.from_pretrained(path, dtype=dtypes, **unchecked)
    except Exception as error:  # diffusers, transformers, tokenizers, safetensors and the Hub: each has its own
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"Cannot load the teacher {source!r}: {told} "
            "Expected 'embedded', a folder in diffusers format, or a Hub id that can be reached."
        ) from error
    pipe.set_progress_bar_config(disable=True)
    for network in pipe.components.values():
        if isinstance(network, torch.nn.Module):
            network.requires_grad_(False).eval()
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")
