"""Time and memory of one UNet forward against the number of tokens."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from pathlib import Path

import torch

from experiments.config import Evaluation
from experiments.distil.setting import Setting
from unet_adapters import MixerAdapter


@torch.no_grad()
def speed(setting: Setting, adapter: MixerAdapter, config: Evaluation) -> list[dict[str, float | int | None]]:
    """Median seconds (and their range) of a UNet forward with the adapter mounted, batch 1, and its peak memory.

    `tokens` counts those of the largest self-attention. Memory is what the forward needs above
    what was there before it: the allocator's peak on a GPU, the peak resident set on Linux, null
    elsewhere.
    """
    unet, pipe = setting.pipe.unet, setting.pipe
    rows: list[dict[str, float | int | None]] = []
    text = setting.states[:1]
    with adapter.mounted():
        for size in config.speed_sizes:
            side = size // pipe.vae_scale_factor
            noisy = torch.randn(1, unet.config.in_channels, side, side, device=pipe.device)
            peak = _peak_bytes(lambda noisy=noisy: unet(noisy, 500, text))
            times = [_seconds(lambda noisy=noisy: unet(noisy, 500, text)) for _ in range(config.speed_repeats)]
            median = statistics.median(times)
            rows.append(
                {
                    "size": size,
                    "tokens": side * side,
                    "seconds": median,
                    "spread": max(times) - min(times),
                    "peak_bytes": peak,
                }
            )
    return rows


def _seconds(run) -> float:  # type: ignore[no-untyped-def]
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_bytes(run) -> int | None:  # type: ignore[no-untyped-def]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        run()
        return None
    ctypes.CDLL(None).malloc_trim(0)  # give freed pages back, or an earlier peak hides this one
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present resident set
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"Cannot read the memory in use: /proc/self/status has no {field}.")
