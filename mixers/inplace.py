"""Arithmetic that reuses a large buffer when no gradient is needed."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply_reusing(buffer: Tensor, factor: Tensor) -> Tensor:
    """Return buffer · factor; without gradients the result overwrites `buffer`.

    Allocating a large tensor costs more than the product itself.

    Args:
        buffer: a tensor that nothing else refers to, with the shape and dtype of the result.
        factor: broadcasts to `buffer`.
    """
    return buffer * factor if torch.is_grad_enabled() else buffer.mul_(factor)


def addcmul_reusing(buffer: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return buffer + a · b; without gradients the result overwrites `buffer`, as in `multiply_reusing`."""
    return torch.addcmul(buffer, a, b) if torch.is_grad_enabled() else buffer.addcmul_(a, b)
