"""When numbers stop being finite: which, where, and in which precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from experiments.training.checkpoints import trainable


def check_losses(
    losses: Mapping[str, float], step: int, again: Callable[[], object], watched: nn.Module | None
) -> None:
    """Refuse to go on with a loss that is not finite.

    Args:
        losses: the terms by name.
        step: of the update.
        again: runs the forward pass once more, to look for the place.
        watched: the network in whose layers to look.

    Raises:
        FloatingPointError: a term is not finite; the message names the terms, the layer and its dtype.
    """
    broken = [name for name, value in losses.items() if not math.isfinite(value)]
    if broken:
        where = "" if watched is None else f" {first_broken(again, watched)}"
        raise FloatingPointError(
            f"Training stopped at step {step}: {', '.join(broken)} not finite.{where} The last checkpoint is intact: "
            "lower the learning rate, train in bf16 or float32, or start the term that broke later (its `start`)."
        )


def check_gradients(model: nn.Module, norm: Tensor, step: int) -> None:
    """Refuse to take a step along gradients that are not finite.

    Raises:
        FloatingPointError: some are not; the message names the first parameters and their dtype.
    """
    if bool(torch.isfinite(norm)):
        return
    broken = [
        f"{name} ({p.grad.dtype})"
        for name, p in trainable(model).items()
        if p.grad is not None and not bool(torch.isfinite(p.grad).all())
    ]
    raise FloatingPointError(
        f"Training stopped at step {step}: the gradients of {len(broken)} parameters are not finite, the first are "
        f"{', '.join(broken[:3])}. The last checkpoint is intact: lower the learning rate, or train in bf16 or float32."
    )


@torch.no_grad()
def first_broken(again: Callable[[], object], watched: nn.Module) -> str:
    """The first layer whose output is not finite in another forward pass, as a sentence."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        for leaf in tree_iter(output):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not found and not torch.isfinite(leaf).all():
                found.append(f"The first layer whose output is not finite is {name} ({leaf.dtype}).")

    with ExitStack() as stack:
        for name, module in watched.named_modules():
            if not any(module.children()):
                hook = module.register_forward_hook(lambda m, i, output, name=name: look(name, output))
                stack.callback(hook.remove)
        again()
    return found[0] if found else "Every layer's output is finite: the loss itself broke."
