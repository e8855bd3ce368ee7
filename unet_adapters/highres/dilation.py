"""ScaleCrafter's dilated convolutions against repeated objects in images larger than those of the training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def dilated_convolutions(unet: Any, dilation: int) -> Iterator[None]:
    """Dilate the 3 × 3 convolutions of the inner levels and the middle block (ScaleCrafter, 2310.07702).

    The receptive field then covers the same share of a large image as it did of the training images.
    """
    inner = [*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]]
    convolutions = [
        module
        for block in inner
        for name, module in block.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.stride == (1, 1)
    ]
    previous = [(conv, conv.dilation, conv.padding) for conv in convolutions]
    try:
        for conv in convolutions:
            conv.dilation = (dilation, dilation)
            conv.padding = (dilation, dilation)
        yield
    finally:
        for conv, old_dilation, old_padding in previous:
            conv.dilation = old_dilation
            conv.padding = old_padding
