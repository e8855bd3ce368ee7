"""Calls to time: a function with its inputs, with or without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Wrapper = Callable[..., Callable[[], object]]
"""Turns (function, *inputs) into a call without arguments."""


def forward_call(function: Callable[..., Any], *inputs: Any) -> Callable[[], object]:
    """Return a call of the function that records no gradients."""

    def run() -> object:
        with torch.no_grad():
            return function(*inputs)

    return run


def forward_backward_call(function: Callable[..., Any], *inputs: Any) -> Callable[[], object]:
    """Return a call of the function and of the gradients of all its tensors, with a fixed random output gradient."""
    leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in inputs]
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    output_gradient: list[Tensor] = []

    def run() -> object:
        y = function(*leaves)
        if not output_gradient:
            output_gradient.append(torch.randn_like(y))
        return torch.autograd.grad(y, tensors, output_gradient[0], allow_unused=True)

    return run


PASSES: dict[str, Wrapper] = {"forward": forward_call, "forward and backward": forward_backward_call}
"""What can be timed of an operator, by the name that tables use."""
