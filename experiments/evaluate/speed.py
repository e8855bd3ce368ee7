"""Time and memory of one UNet forward against the number of tokens."""

from __future__ import annotations

import statistics

import torch

from experiments.bench.memory import peak_bytes
from experiments.bench.timing import seconds
from experiments.config import Evaluation
from experiments.distil.setting import Setting
from unet_adapters import MixerAdapter


@torch.no_grad()
def speed(setting: Setting, adapter: MixerAdapter, config: Evaluation) -> list[dict[str, float | int | None]]:
    """Median seconds (and their range) of a UNet forward with the adapter mounted, batch 1, and its peak memory.

    `tokens` counts those of the largest self-attention. Memory is what `peak_bytes` tells.
    """
    unet, pipe = setting.pipe.unet, setting.pipe
    device, text = str(pipe.device), setting.states[:1]
    rows: list[dict[str, float | int | None]] = []
    with adapter.mounted():
        for size in config.speed_sizes:
            side = size // pipe.vae_scale_factor
            noisy = torch.randn(1, unet.config.in_channels, side, side, device=pipe.device)

            def forward(noisy: torch.Tensor = noisy) -> object:
                return unet(noisy, 500, text)

            peak = peak_bytes(forward, device)
            times = [seconds(forward, 1, device) for _ in range(config.speed_repeats)]
            median, spread = statistics.median(times), max(times) - min(times)
            rows.append({"size": size, "tokens": side * side, "seconds": median, "spread": spread, "peak_bytes": peak})
    return rows
