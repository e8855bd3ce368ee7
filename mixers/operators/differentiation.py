"""Gradients of a function that is computed once more in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Differentiable = Callable[..., "Tensor | tuple[Tensor, ...]"]


def recomputed_gradients(
    function: Differentiable,
    inputs: Sequence[Tensor],
    output_gradients: Sequence[Tensor],
    indices: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """Return the gradients of some inputs of a function, which runs once more; they cannot be differentiated again.

    Args:
        function: (*inputs) -> one tensor or several.
        inputs: its arguments.
        output_gradients: one per output.
        indices: of the inputs whose gradients are returned; None means all.
    """
    indices = range(len(inputs)) if indices is None else indices
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_(i in indices) for i, t in enumerate(inputs)]
        outputs = function(*inputs)
    return torch.autograd.grad(outputs, [inputs[i] for i in indices], output_gradients)


def differentiable_gradients(
    function: Differentiable,
    inputs: Sequence[Tensor | None],
    output_gradients: Sequence[Tensor],
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return gradients that can be differentiated again, as a backward pass needs them under `create_graph=True`.

    Args:
        function: (*inputs) -> one tensor or several, in operations that torch can differentiate any number of times.
        inputs: its arguments, with their graphs.
        output_gradients: one per output.
        needed: for every input, whether its gradient is needed; the others get None.
    """
    # Views have no history but their base: otherwise an input that depends on another one would count twice.
    aliases = [t.view_as(t) if t is not None and need else t for t, need in zip(inputs, needed, strict=True)]
    outputs = function(*aliases)
    pairs = zip([outputs] if isinstance(outputs, Tensor) else outputs, output_gradients, strict=True)
    used = [(output, gradient) for output, gradient in pairs if output.requires_grad]
    gradients = iter(
        torch.autograd.grad(
            [output for output, _ in used],
            [t for t, need in zip(aliases, needed, strict=True) if need and t is not None],
            [gradient for _, gradient in used],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )
    return tuple(next(gradients) if need else None for need in needed)
