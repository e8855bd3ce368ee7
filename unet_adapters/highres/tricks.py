"""What others do against repeated objects at sizes never trained on; both optional, neither needs training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from unet_adapters.highres.denoise import Schedule


class SkipResidual:
    """DemoFusion's skip residual (2311.16973, eq. 5): early steps are drawn to the enlarged image before, noised alike.

    x_t ← c · x'_t + (1 − c) · x_t with c = ((1 + cos(π · (T − t) / T)) / 2)^power, T the number of timesteps.
    """

    def __init__(self, start: Tensor, noise: Tensor, schedule: Schedule, power: float) -> None:
        self.start, self.noise, self.schedule, self.power = start, noise, schedule, power

    def __call__(self, number: int, latents: Tensor) -> Tensor:
        """Latents before step `number` -> latents."""
        total = self.schedule.scheduler.config.num_train_timesteps
        done = (total - float(self.schedule.timesteps[number])) / total
        share = ((1 + math.cos(math.pi * done)) / 2) ** self.power
        return latents.lerp(self.schedule.noised(self.start, self.noise, number).to(latents.dtype), share)


@contextmanager
def dilated_convolutions(unet: Any, dilation: int) -> Iterator[None]:
    """Dilate the 3 × 3 convolutions of the inner levels and the middle (ScaleCrafter, 2310.07702), so that a model sees
    as much of a larger image as it saw of those it was trained on."""
    inner = [*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]]
    convolutions = [
        module
        for block in inner
        for name, module in block.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.stride == (1, 1)
    ]
    before = [(conv, conv.dilation, conv.padding) for conv in convolutions]
    try:
        for conv in convolutions:
            conv.dilation, conv.padding = (dilation, dilation), (dilation, dilation)
        yield
    finally:
        for conv, old, padding in before:
            conv.dilation, conv.padding = old, padding
