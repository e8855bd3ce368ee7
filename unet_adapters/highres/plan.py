"""The memory plan of a large image: what every stage needs, and the savings with which it fits a budget."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from unet_adapters.highres.autoencoder import Tiling
from unet_adapters.highres.estimates import MemoryEstimator
from unet_adapters.highres.memory import format_bytes
from unet_adapters.highres.pipeline import (
    check_largest_size,
    check_not_offloaded,
    check_schedules,
    denoiser,
    guidance_scale,
    native_size,
    size_multiple,
    timestep_options,
)
from unet_adapters.highres.savings import CHUNK_TOKENS, SAVINGS
from unet_adapters.highres.schedule import DenoisingSchedule
from unet_adapters.highres.stages import (
    DEFAULT_STRENGTHS,
    ImageSize,
    ProgressiveStage,
    format_size,
    progressive_stages,
)
from unet_adapters.text_to_image import check_text_to_image

MAX_TENSOR_ELEMENTS = 2**31 - 1
"""Kernels with 32-bit offsets silently compute wrong results on tensors with more elements."""


@dataclass(frozen=True)
class StageEstimate:
    """What one stage needs.

    Attributes:
        stage: its size and strength.
        steps: scheduler steps; second-order schedulers count both halves.
        denoising_bytes, decoding_bytes: peak bytes, the model's weights included.
        largest_tensor: elements of the largest tensor.
        flops: floating-point operations of all steps; matrix products and convolutions.
        seconds: at the given throughput; None without one.
    """

    stage: ProgressiveStage
    steps: int
    denoising_bytes: int
    decoding_bytes: int
    largest_tensor: int
    flops: int
    seconds: float | None

    @property
    def peak_bytes(self) -> int:
        """Peak bytes of the stage."""
        return max(self.denoising_bytes, self.decoding_bytes)


@dataclass(frozen=True)
class MemoryPlan:
    """How an image will be made.

    Attributes:
        stages: what each stage needs with these savings.
        savings: those in use, some of `SAVINGS`.
        tiling: that of the autoencoder.
        chunk_tokens: tokens that feed-forward layers process at a time, with the saving `feed_forward`.
    """

    stages: tuple[StageEstimate, ...]
    savings: tuple[str, ...]
    tiling: Tiling
    chunk_tokens: int = CHUNK_TOKENS

    @property
    def peak_bytes(self) -> int:
        """Peak bytes of all stages."""
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """Seconds of all stages; None without a throughput."""
        times = [stage.seconds for stage in self.stages]
        return None if None in times else sum(t for t in times if t is not None)


class SavingsLevel(NamedTuple):
    """One of the combinations of savings that a plan can use."""

    savings: tuple[str, ...]
    tiling: Tiling


class InsufficientMemoryError(ValueError):
    """The image does not fit the budget, even with every saving."""


def plan_memory(
    pipe: Any,
    size: ImageSize,
    *,
    memory_budget: int | None = None,
    base_size: int | None = None,
    strengths: Sequence[float] = DEFAULT_STRENGTHS,
    steps: int = 50,
    guidance: float | None = None,
    throughput: float | None = None,
    direct: bool = False,
    with_control: bool = False,
    device: str | torch.device | None = None,
) -> MemoryPlan:
    """Choose the fewest savings with which an image fits the budget, and estimate what it needs.

    Args:
        pipe: a text-to-image pipeline, with its mixer mounted.
        size: (height, width) in pixels.
        memory_budget: bytes that may be used, the model's weights included; None: no limit.
        base_size: side of the images that the model was trained on, in pixels; None: from the model's config.
        strengths, steps, guidance: as in `generate`.
        throughput: floating-point operations per second; without it the plan contains no time.
        direct: denoise from noise at the full size, without stages.
        with_control: leave out the saving `skips`, which does not work with a ControlNet.
        device: where the image will be made; None: where the pipeline is. A GPU need not be present: the plan then uses
            the CPU path's block size of mixers, which needs as much memory as fused kernels do.

    Raises:
        InsufficientMemoryError: If not even all savings are enough; the message names the smallest sufficient budget.
        ValueError: If the pipeline is no text-to-image pipeline, its scheduler cannot start from an image, the model
            cannot have this size, or a tensor exceeds MAX_TENSOR_ELEMENTS with every saving.
    """
    check_text_to_image(pipe)
    check_not_offloaded(pipe)
    check_largest_size(pipe, size)
    stages = progressive_stages(size, base_size or native_size(pipe), size_multiple(pipe), strengths)
    if direct:
        stages = (ProgressiveStage(size, 1.0),)
    check_schedules(pipe, steps, stages)
    target = torch.device(device or denoiser(pipe).device)
    estimator = MemoryEstimator(pipe, guidance_scale(pipe, guidance), target)

    def estimate(stage: ProgressiveStage, level: SavingsLevel) -> StageEstimate:
        return _estimate_stage(estimator, stage, level, steps, throughput)

    def fits(level: SavingsLevel) -> bool:
        last = estimate(stages[-1], level)  # the largest stage: if it fits, all fit
        within_budget = memory_budget is None or last.peak_bytes <= memory_budget
        return last.largest_tensor <= MAX_TENSOR_ELEMENTS and within_budget

    levels = savings_levels(target, with_control)
    index = bisect_left(levels, True, key=fits)  # every level needs less than the one before
    if index < len(levels):
        level = levels[index]
        return MemoryPlan(tuple(estimate(stage, level) for stage in stages), level.savings, level.tiling)
    raise _refusal(size, estimate(stages[-1], levels[-1]), memory_budget)


def savings_levels(device: torch.device, with_control: bool = False) -> list[SavingsLevel]:
    """Return the combinations of savings for `device`, the fastest first, each in less memory than the one before.

    `skips` saves nothing on a CPU. With a ControlNet it does not work: its residuals are added to skip connections.
    """
    without_skips = device.type == "cpu" or with_control
    savings = tuple(name for name in SAVINGS if not (without_skips and name == "skips"))
    default = Tiling()
    levels = [SavingsLevel(savings[:count], default) for count in range(1, len(savings) + 1)]
    for tile in (64, 32):
        tiling = replace(default, tile=tile, overview=tile, whole_middle=128 * 128)
        levels.append(SavingsLevel(savings, tiling))
    return levels


def _estimate_stage(
    estimator: MemoryEstimator,
    stage: ProgressiveStage,
    level: SavingsLevel,
    steps: int,
    throughput: float | None,
) -> StageEstimate:
    options = timestep_options(estimator.pipe, stage.size, steps)
    schedule = DenoisingSchedule.create(estimator.pipe.scheduler, steps, stage.strength, "cpu", options)
    call = estimator.unet_call(stage.size, level.savings)
    calls_per_step = estimator.batch if "guidance" in level.savings else 1
    flops = len(schedule.timesteps) * call.flops * calls_per_step
    return StageEstimate(
        stage=stage,
        steps=len(schedule.timesteps),
        denoising_bytes=estimator.weight_bytes + call.peak_bytes,
        decoding_bytes=estimator.weight_bytes + estimator.decoding_bytes(stage.size, level.tiling),
        largest_tensor=call.largest_tensor,
        flops=flops,
        seconds=None if throughput is None else flops / throughput,
    )


def _refusal(size: ImageSize, least: StageEstimate, memory_budget: int | None) -> ValueError:
    """Return the error for an image that does not fit with every saving."""
    image = f"An image of {format_size(size)} pixels"
    if least.largest_tensor > MAX_TENSOR_ELEMENTS:
        return ValueError(
            f"{image} cannot be made: even with every saving a tensor has {least.largest_tensor:,} elements, and "
            f"kernels with 32-bit offsets fail beyond {MAX_TENSOR_ELEMENTS:,}. Choose a smaller size."
        )
    return InsufficientMemoryError(
        f"{image} does not fit in {format_bytes(memory_budget or 0)}: with every saving it needs "
        f"{format_bytes(least.peak_bytes, round_up=True)}. Allow that much, or choose a smaller size."
    )
