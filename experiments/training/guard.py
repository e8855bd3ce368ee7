"""Stop a training whose numbers are no longer finite, and name the layer, parameter and precision where that began."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from experiments.training.state import trainable_parameters

_ADVICE = (
    "The state before this step is saved. Continue from there, or from the checkpoint before it, with a lower learning "
    "rate, in bf16 or float32, or with the broken term starting later (its `start`)."
)


def check_losses(losses: Mapping[str, float], step: int, rerun: Callable[[], object], watched: nn.Module) -> None:
    """Raise if a loss is not finite. All processes call it with the same losses.

    Args:
        losses: the terms by name.
        step: of the update.
        rerun: runs this process's forward passes once more, to search for the layer.
        watched: the network whose layers are searched.

    Raises:
        FloatingPointError: a term is not finite; the message names the terms, the layer and its dtype.
    """
    broken = [name for name, value in losses.items() if not math.isfinite(value)]
    if not broken:
        return
    layers = [layer for layer in gather_object([first_nonfinite_layer(rerun, watched)]) if layer]
    cause = (
        f"The first layer whose output is not finite is {layers[0]}."
        if layers
        else "Every layer's output is finite: the loss itself is not."
    )
    raise FloatingPointError(f"Training stopped at step {step}: {', '.join(broken)} not finite. {cause} {_ADVICE}")


def check_gradients(model: nn.Module, norm: Tensor, step: int) -> None:
    """Raise if the gradients are not finite.

    Args:
        model: whose gradients they are.
        norm: of all of them, a scalar.
        step: of the update.

    Raises:
        FloatingPointError: some are not finite; the message names the first parameters and their dtype.
    """
    if bool(torch.isfinite(norm)):
        return
    broken = [
        f"{name} ({p.grad.dtype})"
        for name, p in trainable_parameters(model).items()
        if p.grad is not None and not bool(torch.isfinite(p.grad).all())
    ]
    cause = (
        f"the gradients of {len(broken)} parameters are not finite, the first are {', '.join(broken[:3])}"
        if broken
        else f"the gradients' norm is {float(norm)}, though each of them is finite"
    )
    raise FloatingPointError(f"Training stopped at step {step}: {cause}. {_ADVICE}")


@torch.no_grad()
def first_nonfinite_layer(rerun: Callable[[], object], watched: nn.Module) -> str | None:
    """Return name and dtype of the first module, in another forward pass, whose output is not finite.

    Children finish before their parents, so a parent is named only if its children's outputs are finite.
    """
    layers: list[str] = []

    def inspect(name: str, output: Any) -> None:
        for leaf in tree_iter(output):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not layers and not torch.isfinite(leaf).all():
                layers.append(f"{name} ({leaf.dtype})")

    with ExitStack() as stack:
        for name, module in watched.named_modules():
            name = name or type(module).__name__
            hook = module.register_forward_hook(lambda m, i, output, name=name: inspect(name, output))
            stack.callback(hook.remove)
        rerun()
    return layers[0] if layers else None
