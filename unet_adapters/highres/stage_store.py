"""The latents of finished stages on disk, so that a run that was killed resumes after its last finished stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unet_adapters.checkpoint import DISTRIBUTION, library_version
from unet_adapters.files import save_tensors
from unet_adapters.highres.fingerprint import config_values, fingerprint
from unet_adapters.highres.pipeline import denoiser, timestep_options
from unet_adapters.highres.plan import MemoryPlan
from unet_adapters.highres.request import GenerationRequest
from unet_adapters.highres.schedule import DenoisingSchedule
from unet_adapters.highres.stages import ProgressiveStage

_LIBRARIES = ("diffusers", "torch")  # a new version may compute another image
_NOISE_LEVELS = ("timesteps", "sigmas", "alphas_cumprod")  # of a scheduler: its config alone does not determine them
_FORMAT = 3


class StageStore:
    """A folder with one file of latents per finished stage; without a folder, it stores nothing.

    Args:
        folder: created when the first stage is saved; None: store nothing.
        key: from `stage_key`; part of the file names, so that stages of another image are never used.
    """

    def __init__(self, folder: str | Path | None, key: str) -> None:
        self.folder = None if folder is None else Path(folder)
        self.key = key

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
        """Write a stage's latents atomically.

        Raises:
            OSError: If the disk is full or fails.
        """
        path = self._path(stage)
        if path is None:
            return
        save_tensors(path, {"latents": latents.cpu()})

    def _path(self, stage: ProgressiveStage) -> Path | None:
        name = f"{self.key}-{stage.size[0]}x{stage.size[1]}.safetensors"
        return None if self.folder is None else self.folder / name


def stage_key(
    pipe: Any, request: GenerationRequest, plan: MemoryPlan, conditions: Sequence[Mapping[str, Tensor]], *inputs: Any
) -> str:
    """Return a hash of everything that the latents of a stage depend on.

    Args:
        pipe: the pipeline: weights, structure and runtime state of its UNet and autoencoder, and the noise levels of
            its scheduler.
        request: what is generated.
        plan: its tiling changes the latents of later stages; its savings do not.
        conditions: the encoded prompts, which depend on text encoders, tokenizers and textual inversion.
        *inputs: other inputs of the image: an image, a strength, a `ControlNetCondition`.
    """
    options = timestep_options(pipe, request.size, request.steps)
    schedule = DenoisingSchedule.create(pipe.scheduler, request.steps, 1.0, "cpu", options).scheduler
    levels = [torch.as_tensor(getattr(schedule, name, ())) for name in _NOISE_LEVELS]
    scheduler = (type(schedule).__qualname__, config_values(schedule.config), levels)
    versions = {name: version(name) for name in _LIBRARIES} | {DISTRIBUTION: library_version()}
    image = (asdict(request), asdict(plan.tiling), conditions, inputs)
    return fingerprint(_FORMAT, versions, image, scheduler, denoiser(pipe), pipe.vae)[:16]
