"""Samples from fixed prompts and seeds, and a look inside: the mixing matrix of one site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from experiments.config import Evaluation
from experiments.distil.setting import Setting
from experiments.evaluate.fidelity import teacher_views
from mixers import structure
from unet_adapters import MixerAdapter


@torch.no_grad()
def save_samples(pipe: StableDiffusionPipeline, config: Evaluation, directory: Path) -> None:
    """Write `directory/<size>/<k>.png`: prompt k at each sample size, the same starting noise for all variants."""
    for size in config.sample_sizes:
        folder = directory / str(size)
        folder.mkdir(parents=True, exist_ok=True)
        noise = [torch.Generator().manual_seed(config.seed + k) for k in range(len(config.prompts))]
        images = pipe(
            list(config.prompts),
            height=size,
            width=size,
            num_inference_steps=config.sample_steps,
            guidance_scale=config.guidance,
            generator=noise,
        ).images
        for k, image in enumerate(images):
            image.save(folder / f"{k}.png")


@torch.no_grad()
def mixing_matrix(setting: Setting, adapter: MixerAdapter, size: int) -> Tensor:
    """Weights (l, l) with which the first site's first head mixes tokens; timestep 500 of one held-out picture."""
    view = Evaluation(sizes=(size,), images=1, timesteps=(500,))
    noisy, steps, text, *_ = teacher_views(setting, size, view)[0]
    site = adapter.sites[0].name
    attention = setting.pipe.unet.get_submodule(site)
    seen: list[Tensor] = []

    def keep(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    with adapter.mounted():
        hook = attention.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            setting.pipe.unet(noisy, steps, text)
        finally:
            hook.remove()
        weights = structure.mixing_matrix(adapter.mixers[site], seen[0], projections=attention)[0, 0]
    weights = weights if weights.ndim == 2 else weights[0]  # where every value channel has its own: the first
    return weights.float().cpu()
