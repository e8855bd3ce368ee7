"""Open a teacher: the embedded one, a local folder or a Hub id, as a plain diffusers pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from experiments.core.devices import best_device
from experiments.core.errors import first_line
from experiments.teacher.noise_schedules import PREDICTION_TYPES
from experiments.teacher.teacher import Teacher
from unet_adapters.text_to_image import check_text_to_image

EMBEDDED = Path(__file__).parent / "weights"
_REQUIRED = ("vae", "text_encoder", "tokenizer", "scheduler")
_NETWORKS = ("unet", "transformer")


def open_teacher(source: str = "embedded", dtype: torch.dtype = torch.float32, variant: str | None = None) -> Teacher:
    """Open a teacher for distillation and evaluation.

    Args:
        source: as `load_teacher` takes it.
        dtype: of the denoising network and the text encoders.
        variant: as `load_teacher` takes it.

    Raises:
        ValueError: as `load_teacher`; or the model cannot be distilled; the message says why.
    """
    pipe = load_teacher(source, dtype, variant)
    for reason in _reasons_against_distillation(pipe):
        raise ValueError(f"Cannot distill the teacher {source!r}: {reason}")
    return Teacher(pipe)


def load_teacher(source: str = "embedded", dtype: torch.dtype = torch.float32, variant: str | None = None) -> Any:
    """Load a text-to-image pipeline on the best device, frozen, without output.

    Stable Diffusion 1.5, 2.1, XL, 3 and 3.5, PixArt-α and Σ, Flux and HunyuanDiT are supported.

    The autoencoder is float32 at least, whatever `dtype`: SDXL's overflows in float16, and its latents are stored and
    trained on. Sample from a pipeline in half precision under `torch.autocast`.

    Args:
        source: `"embedded"`, a folder in diffusers format, or a Hub id.
        dtype: of the denoising network and the text encoders.
        variant: the weight files to read, such as "fp16" for `*.fp16.safetensors`; None: those without a variant.

    Raises:
        ValueError: the model cannot be loaded or is no 4-channel text-to-image model; the message says why.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    path = str(EMBEDDED if source == "embedded" else source)
    try:
        parts = DiffusionPipeline.load_config(path)
        absent = (None, [None, None], (None, None))
        missing = [name for name in _REQUIRED if parts.get(name) in absent]
        if all(parts.get(name) in absent for name in _NETWORKS):
            missing.insert(0, " or ".join(_NETWORKS))
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}, which every text-to-image pipeline has.")
        unchecked = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in parts else {}
        dtypes = {"default": dtype, "vae": torch.promote_types(dtype, torch.float32)}
        pipe = DiffusionPipeline.from_pretrained(path, dtype=dtypes, variant=variant, **unchecked)
        check_text_to_image(pipe)
    except Exception as error:  # diffusers, transformers, tokenizers, safetensors and the Hub each raise their own
        raise ValueError(f"Cannot load the teacher {source!r}: {first_line(error)} {_advice(path, variant)}") from error
    pipe.set_progress_bar_config(disable=True)
    for network in pipe.components.values():
        if isinstance(network, torch.nn.Module):
            network.requires_grad_(False).eval()
    return pipe.to(best_device())


def _reasons_against_distillation(pipe: Any) -> Iterator[str]:
    """Why a text-to-image pipeline cannot be distilled; nothing if it can."""
    unet = getattr(pipe, "unet", None)
    guidance = None if unet is None else unet.config.time_cond_proj_dim
    if guidance is not None:
        yield (
            f"its UNet is conditioned on the guidance scale (time_cond_proj_dim={guidance}), as full LCM models are, "
            "and training would ignore that. Use the model that it was distilled from."
        )
    prediction = pipe.scheduler.config.get("prediction_type", "epsilon")
    if prediction not in (*PREDICTION_TYPES, "flow_prediction"):
        yield f"it predicts {prediction!r}; expected {' or '.join(PREDICTION_TYPES)}, or a flow's velocity."


def _advice(path: str, variant: str | None) -> str:
    """Say what to pass instead; names the variants of a folder that has no other weights."""
    names = [file.name for file in Path(path).glob("unet/*.safetensors")]
    variants = sorted({name.split(".")[1] for name in names if name.count(".") == 2})
    if variants and variant not in variants and not any(name.count(".") == 1 for name in names):
        return f"The folder has only weights of the variant {', '.join(variants)}: pass --variant {variants[0]}."
    return "Expected 'embedded', a folder in diffusers format, or a Hub id that can be reached."
