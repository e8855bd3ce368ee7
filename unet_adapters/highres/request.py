"""What to generate, as plain values, and what was generated."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from unet_adapters.highres.plan import MemoryPlan
from unet_adapters.highres.stages import DEFAULT_STRENGTHS, ImageSize, ProgressiveStage

METADATA_KEY = "mixers"
"""Name of the PNG text chunk that says how an image was made."""


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate, as plain values; part of the image's metadata and of the key of its finished stages.

    Attributes:
        prompt: what the image shows.
        negative_prompt: what it does not show; None: as the pipeline does without one (SDXL guides away from zeros).
        size: (height, width) in pixels.
        mode: `progressive` from the base size upwards, or `direct` from noise at the full size, for study.
        base_size: side of the first stage's square in pixels; None: the size that the model was trained on.
        strengths: of the stages after the first.
        steps: scheduler steps of a whole schedule.
        guidance: scale of classifier-free guidance; 1 is none. None: the pipeline's own default.
        seed: of the noise.
        upscale: how an image gets to the next size: as `pixels` (decoded, bicubic, encoded) or as `latents` (bicubic).
        skip_residual: cosine power of DemoFusion's skip residual (2311.16973, eq. 5); None: no skip residual.
        dilation: of the 3 × 3 convolutions in the last stage (ScaleCrafter, 2310.07702); 1: no dilation.
    """

    prompt: str
    negative_prompt: str | None = None
    size: ImageSize = (1024, 1024)
    mode: Literal["progressive", "direct"] = "progressive"
    base_size: int | None = None
    strengths: tuple[float, ...] = DEFAULT_STRENGTHS
    steps: int = 50
    guidance: float | None = None
    seed: int = 0
    upscale: Literal["pixels", "latents"] = "pixels"
    skip_residual: float | None = None
    dilation: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("progressive", "direct"):
            raise ValueError(f"Unknown mode {self.mode!r}: expected progressive or direct.")
        if self.upscale not in ("pixels", "latents"):
            raise ValueError(f"Unknown upscale {self.upscale!r}: expected pixels or latents.")
        for name in ("steps", "guidance", "dilation"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}.")
        for name in ("guidance", "skip_residual"):
            value = getattr(self, name)
            if value is not None and (not math.isfinite(value) or value < 0):
                raise ValueError(f"{name}: expected a finite number, not negative; got {value}.")


@dataclass(frozen=True)
class GenerationResult:
    """An image and how it was made.

    Attributes:
        pixels: (height, width, 3), uint8, on the CPU.
        request: what was requested.
        stages: all stages, including those that were restored from files.
        plan: memory, savings and tiling.
        restored_stages: how many stages were restored from files of an earlier run.
    """

    pixels: Tensor
    request: GenerationRequest
    stages: tuple[ProgressiveStage, ...]
    plan: MemoryPlan
    restored_stages: int = 0

    def save(self, path: str | Path, **metadata: Any) -> None:
        """Write a PNG with metadata: request, stages, savings, tiling and `metadata`, as JSON in the chunk `mixers`."""
        record: dict[str, Any] = {
            **asdict(self.request),
            "stages": [asdict(stage) for stage in self.stages],
            "savings": self.plan.savings,
            "tiling": asdict(self.plan.tiling),
            **metadata,
        }
        info = PngInfo()
        info.add_text(METADATA_KEY, json.dumps(record))
        Image.fromarray(self.pixels.numpy()).save(path, format="PNG", pnginfo=info)
