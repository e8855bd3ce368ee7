"""Open a teacher: the embedded one, a local folder or a Hub id, as a plain diffusers pipeline."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

EMBEDDED = Path(__file__).parent / "weights"


def load_teacher(source: str = "embedded") -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline in float32 on the best device at hand, frozen and silent.

    Args:
        source: `"embedded"`, a folder in diffusers format, or a Hub id.

    Raises:
        ValueError: nothing loadable there; the message says what was tried.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    path = EMBEDDED if source == "embedded" else source
    try:
        pipe = StableDiffusionPipeline.from_pretrained(
            str(path), safety_checker=None, requires_safety_checker=False, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Cannot load the teacher {source!r}: {str(error).splitlines()[0]} "
            "Expected 'embedded', a folder in diffusers format, or a Hub id that can be reached."
        ) from error
    pipe.set_progress_bar_config(disable=True)
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        network.requires_grad_(False).eval()
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")
