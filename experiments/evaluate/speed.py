"""Time, memory, operations and state of one UNet forward against the number of tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from experiments.config import EvaluationConfig
from experiments.core.memory import measure_peak_bytes
from experiments.core.timing import time_interleaved
from experiments.distill.context import DistillationContext
from experiments.distill.loss import autocast
from unet_adapters import MixerAdapter

Row = dict[str, float | int | None]


@torch.no_grad()
def speed(setting: DistillationContext, adapter: MixerAdapter, config: EvaluationConfig) -> list[Row]:
    """A UNet forward with the adapter mounted, batch 1, at each of `speed_sizes`.

    tokens: latents' pixels, which are the tokens of the largest self-attention.
    seconds, spread: median and range over turns, in which all sizes are timed one after the other.
    peak_bytes: what `measure_peak_bytes` returns.
    flops: multiply-adds × 2; the UNet's as torch counts them, the mixers' by their formula, whatever the backend.
    state_size: the numbers that the mixers carry from token to token, summed over sites.
    """
    device, factor = str(setting.pipe.device), setting.pipe.vae_scale_factor
    forwards = {size: _forward(setting, size // factor) for size in config.speed_sizes}
    with adapter.mounted(), autocast(setting.teacher):
        times = time_interleaved({str(s): run for s, run in forwards.items()}, config.speed_repeats, 1, device=device)
        rows: list[Row] = []
        for size, run in forwards.items():
            turns = times[str(size)]
            rows.append(
                {
                    "size": size,
                    "tokens": (size // factor) ** 2,
                    "seconds": statistics.median(turns),
                    "spread": max(turns) - min(turns),
                    "peak_bytes": measure_peak_bytes(run, device),
                    **cost(adapter, size, run),
                }
            )
    return rows


def cost(adapter: MixerAdapter, size: int, run: Callable[[], object]) -> Row:
    """flops and state_size of one forward `run`, of a picture of `size` px, with the adapter mounted."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        run()
    counts = counter.get_flop_counts()
    tokens = {row.site: row.tokens for row in adapter.status((size, size))}
    flops, state = counter.get_total_flops(), 0
    for site, mixer in adapter.mixers.items():
        length = tokens[site]
        if length is None:
            return {"flops": None, "state_size": None}
        counted = counts.get(f"{type(adapter.model).__name__}.{site}", {})
        flops += mixer.flops(length) - sum(counted.values())
        state += mixer.state_size(length)
    return {"flops": flops, "state_size": state}


def _forward(setting: DistillationContext, side: int) -> Callable[[], object]:
    teacher = setting.teacher
    noisy = torch.randn(1, teacher.unet.config.in_channels, side, side, device=teacher.device)
    steps = torch.full((1,), 500, device=teacher.device)
    conditions = {name: value[:1] for name, value in next(iter(setting.encoded.sizes.values())).items()}
    return partial(teacher.predict, noisy, steps, conditions)


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query, key, value))


_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}  # torch counts the GPU's only
