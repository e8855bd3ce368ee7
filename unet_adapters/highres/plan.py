"""What a large image will need, before the work: memory and time of every stage, and the savings that make it fit."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unet_adapters.highres import vae as autoencoder
from unet_adapters.highres.ladder import STRENGTHS, Size, Stage, ladder, shown
from unet_adapters.highres.memory import Allocations, foresee
from unet_adapters.highres.savings import CHUNK_TOKENS, SAVINGS, save_memory
from unet_adapters.highres.vae import Tiling
from unet_adapters.hosts import find_host

LOOKED_AT = 8192
"""Latent places of an image up to which a UNet's call is gone through one operation after the other."""

LEAST_CHUNK = 512  # tokens: smaller parts of smaller images only take time

LARGEST = 2**31 - 1
"""Elements of a tensor from which on kernels with 32-bit offsets go wrong, silently."""


@dataclass(frozen=True)
class StagePlan:
    """What one stage will need.

    Attributes:
        stage: its size and strength.
        steps: calls of the scheduler.
        denoising, decoding: bytes at the peak, the model's weights included.
        largest: elements of the largest tensor.
        flops: of all its steps; matrix products and convolutions.
        seconds: at the rate that was handed over; None without one.
    """

    stage: Stage
    steps: int
    denoising: int
    decoding: int
    largest: int
    flops: int
    seconds: float | None

    @property
    def peak(self) -> int:
        """Bytes at the stage's peak."""
        return max(self.denoising, self.decoding)


@dataclass(frozen=True)
class Plan:
    """How an image will be made.

    Attributes:
        stages: what each needs, with these savings.
        savings: those in force, see `savings`.
        tiling: of the autoencoder.
        chunk_tokens: of feed-forward layers, where these are saved on.
    """

    stages: tuple[StagePlan, ...]
    savings: tuple[str, ...]
    tiling: Tiling
    chunk_tokens: int = CHUNK_TOKENS

    @property
    def peak(self) -> int:
        """Bytes at the peak of all stages."""
        return max(stage.peak for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """Of all stages."""
        times = [stage.seconds for stage in self.stages]
        return None if None in times else sum(t for t in times if t is not None)


class TooLittleMemory(ValueError):
    """No way to make the image fits the budget."""


def make_plan(
    pipe: Any,
    size: Size,
    *,
    budget: int | None = None,
    base: int | None = None,
    strengths: Sequence[float] = STRENGTHS,
    steps: int = 50,
    guidance: float = 7.5,
    rate: float | None = None,
    direct: bool = False,
    device: str | torch.device | None = None,
) -> Plan:
    """Choose the fewest savings with which an image fits, and say what it needs.

    Args:
        pipe: a Stable Diffusion pipeline, with what is mounted in it.
        size: (height, width) in pixels.
        budget: bytes that may be used, the model's weights included; None: as many as it takes.
        base: side of the images that the model was trained on; None asks its UNet.
        strengths, steps, guidance: as of `generate`.
        rate: floating-point operations a second, see `measure_rate`; without it no time is told.
        direct: denoise at the full size from noise, without stages.
        device: that the work will be done on; None: where the pipeline is. A GPU that is not at hand is reckoned as a
            CPU's blocks of tokens are, which need what fused kernels need; and skip connections can wait on the CPU.

    Raises:
        TooLittleMemory: not even all savings are enough; the message says what is.
        ValueError: a size that the model cannot have, or tensors beyond LARGEST whatever is saved.
    """
    unit = latent_unit(pipe)
    stages = ladder(size, base or native_side(pipe), unit, strengths)
    stages = (Stage(size, 1.0),) if direct else stages
    place = torch.device(device or pipe.unet.device)
    foresight, choices = _Foresight(pipe, steps, guidance, rate, place), _choices(place)

    def fits(choice: Choice) -> bool:
        last = foresight.stage(stages[-1], *choice)  # the largest: what fits there fits everywhere
        return last.largest <= LARGEST and (budget is None or last.peak <= budget)

    found = bisect_left(choices, True, key=fits)  # each choice takes less than the one before
    if found < len(choices):
        return Plan(tuple(foresight.stage(stage, *choices[found]) for stage in stages), *choices[found])
    least = foresight.stage(stages[-1], *choices[-1])
    asked = f"An image of {shown(size)} pixels"
    if least.largest > LARGEST:
        raise ValueError(
            f"{asked} cannot be made: with every saving a tensor has {least.largest:,} elements, and kernels that "
            f"count in 32 bits go wrong beyond {LARGEST:,}. Make it smaller."
        )
    raise TooLittleMemory(
        f"{asked} does not fit in {told(budget or 0)}: with every saving it needs {told(least.peak, up=True)}. Give it "
        "that much, or make it smaller."
    )


Choice = tuple[tuple[str, ...], Tiling]


def _choices(device: torch.device) -> list[Choice]:
    """Savings and tilings, the fastest first, each in less memory than the one before."""
    of_use = SAVINGS if device.type != "cpu" else tuple(name for name in SAVINGS if name != "skips")
    plain = Tiling()
    found = [(of_use[:n], plain) for n in range(1, len(of_use) + 1)]
    smaller = [replace(plain, tile=tile, overview=tile, whole_middle=128 * 128) for tile in (64, 32)]
    return [*found, *((of_use, tiling) for tiling in smaller)]


class _Foresight:
    """What stages need; what was found once is not looked for again."""

    def __init__(self, pipe: Any, steps: int, guidance: float, rate: float | None, place: torch.device) -> None:
        self.pipe, self.steps, self.guidance, self.rate = pipe, steps, guidance, rate
        self.weights, on_cpu = weight_bytes(pipe), place.type == "cpu"
        self._look = cache(lambda size, savings, chunk: _look(pipe, size, savings, chunk, guidance, on_cpu))
        self._decoding = cache(lambda size, tiling: foresee_decoding(pipe, size, tiling, on_cpu).peak)

    def stage(self, stage: Stage, savings: tuple[str, ...], tiling: Tiling) -> StagePlan:
        """One stage with these savings."""
        runs = max(1, self.steps - min(self.steps - 1, round(self.steps * (1 - stage.strength))))
        step = self.step(stage.size, savings)
        flops = runs * step.flops * (2 if self.guidance != 1 and "guidance" in savings else 1)
        decoding = self.weights + self._decoding(stage.size, tiling)
        seconds = None if self.rate is None else flops / self.rate
        return StagePlan(stage, runs, self.weights + step.peak, decoding, step.largest, flops, seconds)

    def step(self, size: Size, savings: tuple[str, ...]) -> Foreseen:
        """One call of the UNet; see `foresee_step`."""
        times = size[0] * size[1] / (LOOKED_AT * pixels_a_place(self.pipe) ** 2)
        if times <= 1:
            found = self._look(size, savings, CHUNK_TOKENS)
            return Foreseen(found.peak, found.largest, found.flops)
        unit, chunk = latent_unit(self.pipe), max(LEAST_CHUNK, CHUNK_TOKENS >> int(math.log2(times)))
        shrunk = ((times * part) ** 0.5 for part in (1, 2))
        far, near = (tuple(max(unit, round(side / by / unit) * unit) for side in size) for by in shrunk)
        (x, a), (y, b) = ((s[0] * s[1], self._look(s, savings, chunk)) for s in (far, near))
        share = (size[0] * size[1] - y) / (y - x)

        def line(u: int, v: int) -> int:
            return round(v + (v - u) * share)

        # A module each: where a small image has its peak, a large one need not have it.
        peak = max(line(a.peaks[name], b.peaks[name]) for name in b.peaks)
        largest = max(line(a.tensors[name], b.tensors[name]) for name in b.tensors)
        return Foreseen(peak, largest, line(a.flops, b.flops))


def foresee_step(pipe: Any, size: Size, savings: Sequence[str], guidance: float) -> Foreseen:
    """One call of the UNet for an image of `size`, as `denoise` will make it.

    Beyond LOOKED_AT places it is the straight line through two smaller sizes, for every module its own, with parts of
    feed-forward layers that are as much smaller: mixers go over their tokens in blocks, and a million blocks take their
    time even where nothing is computed. With a mixer all of it is linear in the places; under softmax attention the
    operations are not, and are too few here.
    """
    return _Foresight(pipe, 1, guidance, None, pipe.unet.device).step(size, tuple(savings))


class Foreseen(NamedTuple):
    """What a call needs: bytes at the peak, elements of the largest tensor, operations."""

    peak: int
    largest: int
    flops: int


def _look(pipe: Any, size: Size, savings: Sequence[str], chunk: int, guidance: float, on_cpu: bool) -> Allocations:
    unet, batch = pipe.unet, 1 if guidance == 1 or "guidance" in savings else 2
    height, width = (side // pixels_a_place(pipe) for side in size)
    host = find_host(pipe)
    shapes = host.condition_shapes(batch)

    def run(latents: Tensor, *tensors: Tensor) -> Tensor:
        conditions = host.forward_arguments(dict(zip(shapes, tensors, strict=True)))
        result: Tensor = unet(latents, torch.tensor(500), return_dict=False, **conditions)[0]
        return result

    with save_memory(unet, savings, chunk, pretend=True):
        inputs = [(shape, unet.dtype) for shape in (host.latent_shape((height, width), batch), *shapes.values())]
        return foresee(run, unet, *inputs, device=unet.device, on_cpu=on_cpu)


def foresee_decoding(pipe: Any, size: Size, tiling: Tiling, on_cpu: bool | None = None) -> Allocations:
    """Decoding an image of `size` in tiles: the largest of the middle block, the overview and a tile.

    Args:
        on_cpu: whether a CPU will do it; None: if the autoencoder is there.
    """
    vae, factor = pipe.vae, pixels_a_place(pipe)
    latents = (1, vae.config.latent_channels, *(side // factor for side in size))
    dtype = next(vae.parameters()).dtype
    return foresee(
        lambda z: autoencoder.rehearse(vae, z, tiling), vae, (latents, dtype), device=vae.device, on_cpu=on_cpu
    )


def weight_bytes(pipe: Any) -> int:
    """Bytes of all weights of a pipeline."""
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return sum(p.numel() * p.element_size() for network in networks for p in network.parameters())


def native_side(pipe: Any) -> int:
    """The side, in pixels, of the images that the model was trained on, as its UNet's config says."""
    return int(pipe.unet.config.sample_size) * pixels_a_place(pipe)


def pixels_a_place(pipe: Any) -> int:
    """Pixels along one side of a latent place."""
    return int(pipe.vae_scale_factor)


def latent_unit(pipe: Any) -> int:
    """Sides are multiples of this many pixels, so that every level of the UNet halves without rounding."""
    return pixels_a_place(pipe) << (len(pipe.unet.config.block_out_channels) - 1)


def told(count: int, *, up: bool = False) -> str:
    """Bytes as people read them; with `up`, rounded upwards, so that a budget copied from it is enough."""
    power = min(4, int(math.log(max(count, 1), 1024)))
    value = count / 1024**power
    places = max(0, 2 - int(math.log10(max(value, 1))))
    value = math.ceil(value * 10**places) / 10**places if up else round(value, places)
    return f"{value:.{places}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
