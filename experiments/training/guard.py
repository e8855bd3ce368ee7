"""When numbers stop being finite: which, where, and in which precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from experiments.training.checkpoints import trainable

_ADVICE = (
    "The state before this step is saved. Go on from there, or from the checkpoint before it, with a lower learning "
    "rate, in bf16 or float32, or with the term that broke starting later (its `start`)."
)


def check_losses(losses: Mapping[str, float], step: int, again: Callable[[], object], watched: nn.Module) -> None:
    """Refuse to go on with a loss that is not finite. All processes call it with the same losses.

    Args:
        losses: the terms by name.
        step: of the update.
        again: runs this process's forward passes once more, to look for the place.
        watched: the network in whose layers to look.

    Raises:
        FloatingPointError: a term is not finite; the message names the terms, the layer and its dtype.
    """
    broken = [name for name, value in losses.items() if not math.isfinite(value)]
    if broken:
        places = [place for place in gather_object([first_broken(again, watched)]) if place]
        where = (
            f"The first layer whose output is not finite is {places[0]}."
            if places
            else "Every layer's output is finite: the loss itself broke."
        )
        raise FloatingPointError(f"Training stopped at step {step}: {', '.join(broken)} not finite. {where} {_ADVICE}")


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
    which = (
        f"the gradients of {len(broken)} parameters are not finite, the first are {', '.join(broken[:3])}"
        if broken
        else f"the gradients' norm is {float(norm)}, though each of them is finite"
    )
    raise FloatingPointError(f"Training stopped at step {step}: {which}. {_ADVICE}")


@torch.no_grad()
def first_broken(again: Callable[[], object], watched: nn.Module) -> str | None:
    """Name and dtype of the first module, in another forward pass, whose output is not finite.

    Children finish before their parents: a parent is named where its own sums broke between children that did not.
    """
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        for leaf in tree_iter(output):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not found and not torch.isfinite(leaf).all():
                found.append(f"{name} ({leaf.dtype})")

    with ExitStack() as stack:
        for name, module in watched.named_modules():
            name = name or type(module).__name__
            hook = module.register_forward_hook(lambda m, i, output, name=name: look(name, output))
            stack.callback(hook.remove)
        again()
    return found[0] if found else None
