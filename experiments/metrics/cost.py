"""Time, memory, operations and state of one UNet forward pass against the number of tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch.utils.flop_counter import FlopCounterMode

from experiments.config import ImageSide
from experiments.core.memory import measure_peak_bytes
from experiments.core.timing import time_interleaved
from experiments.distill.context import DistillationContext
from experiments.distill.loss import autocast
from experiments.metrics.base import LinePlot, Metric, MetricOptions, MetricRow, Quantity, register_metric
from experiments.metrics.inputs.student import EvaluatedStudent
from unet_adapters import MixerAdapter
from unet_adapters.highres.memory import CPU_ATTENTION

_TOKENS = "tokens of the largest self-attention"
_GROWTH = (
    "The number behind a label is the exponent over its last three points: 1 grows with the number of tokens, 2 with "
    "its square. At few tokens the rest of the network dominates."
)


class CostRow(MetricRow):
    """Cost of one forward pass at batch 1.

    Attributes:
        size: side of the image in pixels.
        tokens: of the largest self-attention: latent pixels in most UNets, patches of them in transformers.
        seconds: median over repetitions, in which all sizes are timed one after the other.
        spread: largest minus smallest time, in seconds.
        peak_bytes: peak memory above what is in use before the call.
        flops: multiply-adds × 2 as torch counts them, text tokens included. Operators count as their chunked
            formulation, whatever the backend, because torch cannot look into kernels.
        state_size: numbers that are carried from token to token, summed over the adapter's sites; at sites with fewer
            than `min_tokens` tokens the keys and values of softmax attention.
    """

    size: int
    tokens: int
    seconds: float
    spread: float
    peak_bytes: int | None = None
    flops: int | None = None
    state_size: int | None = None


class CostOptions(MetricOptions):
    """Which sizes, and how often they are timed."""

    sizes: tuple[ImageSide, ...] = Field((64, 128, 256, 512), description="sides in pixels")
    repeats: int = Field(3, gt=0, description="timings of each size")


@register_metric("cost")
class Cost(Metric):
    """Time, peak memory, operations and state of one UNet forward pass with the adapter mounted, batch 1."""

    title = "Time and memory"
    section_order = 90
    row = CostRow
    options_type = CostOptions
    quantities = (
        Quantity("seconds", "time of one forward pass (ms)"),
        Quantity("spread", "range of times", better="neither"),
        Quantity("peak_bytes", "peak memory of one forward pass (MiB)"),
        Quantity("flops", "GFLOP of one forward pass"),
        Quantity("state_size", "numbers carried between tokens"),
    )
    figures = (
        LinePlot(
            "tokens",
            "seconds",
            _TOKENS,
            f"Time of one UNet forward pass, batch 1. {_GROWTH} Other work on the machine is included in the times.",
            shows_growth=True,
            scale=1e-3,
        ),
        LinePlot(
            "tokens",
            "peak_bytes",
            _TOKENS,
            f"Peak memory of one UNet forward pass, batch 1. {_GROWTH}",
            shows_growth=True,
            scale=2.0**20,
        ),
        LinePlot(
            "tokens",
            "flops",
            _TOKENS,
            f"Operations of one UNet forward pass, batch 1. {_GROWTH}",
            shows_growth=True,
            scale=1e9,
        ),
    )

    @torch.no_grad()
    def measure(self, student: EvaluatedStudent) -> list[MetricRow]:
        """See `Metric.measure`."""
        context = student.context
        device = str(context.pipe.device)
        factor = context.pipe.vae_scale_factor
        forwards = {size: forward_pass(context, size // factor) for size in self.options.sizes}
        rows: list[MetricRow] = []
        with student.adapter.mounted(), autocast(context.teacher):
            runs = {str(size): run for size, run in forwards.items()}
            times = time_interleaved(runs, self.options.repeats, 1, device=device)
            for size, run in forwards.items():
                flops, state_size = count_operations(student.adapter, size, run)
                rows.append(
                    CostRow(
                        size=size,
                        tokens=most_tokens(context, size // factor),
                        seconds=statistics.median(times[str(size)]),
                        spread=max(times[str(size)]) - min(times[str(size)]),
                        peak_bytes=measure_peak_bytes(run, device),
                        flops=flops,
                        state_size=state_size,
                    )
                )
        return rows


def count_operations(adapter: MixerAdapter, size: int, run: Callable[[], object]) -> tuple[int, int | None]:
    """Count the FLOPs and the state size of one forward pass of an image of `size` px, with the adapter mounted.

    Args:
        adapter: the adapter.
        size: side of the image in pixels.
        run: the forward pass.

    Returns:
        FLOPs of the whole network, and the numbers that are carried between image tokens, which is None if a site's
        number of tokens is not known.
    """
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter, _chunked_operators(adapter):
        run()
    state_size = 0
    for row in adapter.status((size, size)):
        if row.tokens is None:
            return counter.get_total_flops(), None
        is_mixed = row.tokens >= adapter.min_tokens
        state_size += adapter.mixers[row.site].state_size(row.tokens) if is_mixed else 2 * row.tokens * row.dim
    return counter.get_total_flops(), state_size


def most_tokens(context: DistillationContext, side: int) -> int:
    """Return the tokens of the largest self-attention for latents of `side` × `side`; latent pixels if not known."""
    host = context.teacher.host
    counts = [host.tokens_at(site, (side, side)) for site in host.sites()]
    return max((count for count in counts if count is not None), default=side**2)


@contextmanager
def _chunked_operators(adapter: MixerAdapter) -> Iterator[None]:
    """Run operators in the chunked formulation, whose products torch sees."""
    configs: dict[str, Any] = {
        name: mixer.config for name, mixer in adapter.mixers.items() if hasattr(mixer.config, "backend")
    }
    try:
        for name, config in configs.items():
            adapter.mixers[name].config = replace(config, backend="chunked")
        yield
    finally:
        for name, config in configs.items():
            adapter.mixers[name].config = config


def forward_pass(context: DistillationContext, side: int) -> Callable[[], object]:
    """Return a function that runs the network on random latents of `side` × `side`, at timestep 500."""
    teacher = context.teacher
    noisy = torch.randn(teacher.host.latent_shape((side, side)), device=teacher.device)
    steps = torch.full((1,), 500, device=teacher.device)
    conditions = {name: value[:1] for name, value in next(iter(context.encoded.sizes.values())).items()}
    return partial(teacher.predict, noisy, steps, conditions)
