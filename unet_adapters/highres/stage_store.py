"""The latents of finished stages on disk, so that a run that was killed resumes after its last finished stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unet_adapters.highres.denoising import ControlNetCondition
from unet_adapters.highres.request import GenerationRequest
from unet_adapters.highres.stages import ProgressiveStage


class StageStore:
    """A folder with one file of latents per finished stage; without a folder, it stores nothing.

    File names contain a hash of everything that the image depends on, so that the stages of another request or of
    another model are never used.
    """

    def __init__(self, folder: str | Path | None, pipe: Any, request: GenerationRequest, *inputs: Any) -> None:
        """Open a folder for one image.

        Args:
            folder: created when the first stage is saved; None: store nothing.
            pipe: the pipeline, with its mixer mounted.
            request: what is generated.
            *inputs: other inputs of the image: an image, a strength, a `ControlNetCondition`.
        """
        self.folder = None if folder is None else Path(folder)
        self.key = "" if self.folder is None else _key(pipe, request, inputs)

    def load_latest(self, stages: Sequence[ProgressiveStage]) -> tuple[Tensor | None, int]:
        """Return the latents of the last finished stage and the number of finished stages; None and 0 if none is."""
        for number in reversed(range(len(stages))):
            path = self._path(stages[number])
            if path is not None and path.is_file():
                try:
                    with safe_open(path, framework="pt") as file:
                        return file.get_tensor("latents"), number + 1
                except SafetensorError:
                    continue  # damaged: use the stage before
        return None, 0

    def save(self, stage: ProgressiveStage, latents: Tensor) -> None:
        """Write a stage's latents atomically."""
        path = self._path(stage)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            save_file({"latents": latents.cpu().contiguous()}, partial)
            partial.replace(path)

    def _path(self, stage: ProgressiveStage) -> Path | None:
        name = f"{self.key}-{stage.size[0]}x{stage.size[1]}.safetensors"
        return None if self.folder is None else self.folder / name


def _key(pipe: Any, request: GenerationRequest, inputs: Sequence[Any]) -> str:
    parts = [asdict(request), dict(pipe.scheduler.config), [_describe(part) for part in (pipe.unet, *inputs)]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _describe(value: Any) -> Any:
    """Return what identifies an input of an image: for a network some values of every weight, for an image all."""
    if isinstance(value, ControlNetCondition):
        return [_describe(part) for part in (value.network, value.image, value.scale)]
    if isinstance(value, nn.Module):
        tensors = [*value.named_parameters(), *value.named_buffers()]
        return [(name, str(t.dtype), t.flatten()[:: max(1, t.numel() // 16)].tolist()) for name, t in tensors]
    if isinstance(value, Tensor):
        return hashlib.sha256(value.detach().float().cpu().numpy().tobytes()).hexdigest()
    return hashlib.sha256(value.convert("RGB").tobytes()).hexdigest() if isinstance(value, Image.Image) else value
