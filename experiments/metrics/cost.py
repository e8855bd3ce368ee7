"""Time, memory, operations and state of one UNet forward pass against the number of tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from pydantic import Field
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from experiments.config import ImageSide
from experiments.core.memory import measure_peak_bytes
from experiments.core.timing import time_interleaved
from experiments.distill.context import DistillationContext
from experiments.distill.loss import autocast
from experiments.metrics.base import LinePlot, Metric, MetricOptions, MetricRow, Quantity, register_metric
from experiments.metrics.inputs.student import EvaluatedStudent
from unet_adapters import MixerAdapter

_TOKENS = "tokens of the largest self-attention"
_GROWTH = (
    "The number behind a label is the exponent over its last three points: 1 grows with the number of tokens, 2 with "
    "its square. At few tokens the rest of the network dominates."
)


class CostRow(MetricRow):
    """Cost of one forward pass at batch 1.

    Attributes:
        size: side of the image in pixels.
        tokens: latent pixels, which are the tokens of the largest self-attention.
        seconds: median over repetitions, in which all sizes are timed one after the other.
        spread: largest minus smallest time, in seconds.
        peak_bytes: peak memory above what is in use before the call.
        flops: multiply-adds × 2: the UNet's as torch counts them, the mixers' by their formula, whatever the backend.
        state_size: numbers that the mixers carry from token to token, summed over sites.
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
                        tokens=(size // factor) ** 2,
                        seconds=statistics.median(times[str(size)]),
                        spread=max(times[str(size)]) - min(times[str(size)]),
                        peak_bytes=measure_peak_bytes(run, device),
                        flops=flops,
                        state_size=state_size,
                    )
                )
        return rows


def count_operations(adapter: MixerAdapter, size: int, run: Callable[[], object]) -> tuple[int | None, int | None]:
    """Return FLOPs and state size of one forward pass of an image of `size` px, with the adapter mounted.

    Both are None if a site's number of tokens is not known.
    """
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        run()
    counts = counter.get_flop_counts()
    tokens = {row.site: row.tokens for row in adapter.status((size, size))}
    flops = counter.get_total_flops()
    state_size = 0
    for site, mixer in adapter.mixers.items():
        length = tokens[site]
        if length is None:
            return None, None
        counted = counts.get(f"{type(adapter.model).__name__}.{site}", {})
        flops += mixer.flops(length) - sum(counted.values())
        state_size += mixer.state_size(length)
    return flops, state_size


def forward_pass(context: DistillationContext, side: int) -> Callable[[], object]:
    """Return a function that runs the network on random latents of `side` × `side`, at timestep 500."""
    teacher = context.teacher
    noisy = torch.randn(teacher.host.latent_shape((side, side)), device=teacher.device)
    steps = torch.full((1,), 500, device=teacher.device)
    conditions = {name: value[:1] for name, value in next(iter(context.encoded.sizes.values())).items()}
    return partial(teacher.predict, noisy, steps, conditions)


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query, key, value))


_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops
}  # torch itself counts only the GPU's
