"""Whether derivatives are taken by other means than a backward pass."""

from __future__ import annotations

import torch


def needs_plain_operations() -> bool:
    """Return whether torch.func (vmap, grad, jvp, …) or forward-mode differentiation is active.

    Both see only torch's own out-of-place operations: they can neither use the gradients of a custom
    `torch.autograd.Function` nor write a batched tensor into one that is not batched.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
