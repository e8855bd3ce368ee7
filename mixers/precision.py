"""The precision of sums over tokens: float32 at least, whatever the inputs and autocast say."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of states and of sums over tokens: the widest of the inputs, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on devices that have no float64 (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast on the device of a tensor, because it would compute sums over tokens in half precision."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
