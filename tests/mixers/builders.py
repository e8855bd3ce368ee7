"""Tensors and mixers in float64, for comparisons with formulas."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def float64(*shape: int) -> Tensor:
    """Normal random numbers."""
    return torch.randn(*shape, dtype=torch.float64)


def disturbed(module: Module, noise: float = 0.2) -> Module:
    """The module in float64, with normal noise added to every parameter, so that none is at its special start."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return module
