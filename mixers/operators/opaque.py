"""What a compiled graph does not look into.

Loops over chunks are one node of it, so that another number of tokens compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
Formulation = Callable[..., tuple[Tensor, Tensor]]


def constant_in_graphs(function: F) -> F:
    """Make a compiled graph take a function's result as a constant: it runs when the graph is traced.

    What `torch.compiler.assume_constant_result` does, without importing the compiler, and with it triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def opaque(name: str, formulation: Formulation) -> Formulation:
    """Make a formulation a custom operator of torch wherever a graph is being compiled; elsewhere it runs as it is.

    Args:
        name: of the operator, unique.
        formulation: (*tensors, diagonal) -> (result, memory); of the tensors the last but one has the shape of the
            result and the last that of the memory. Its gradient, compiled, runs it once more: that costs its time
            again, and keeps nothing but the tensors.
    """

    @torch.library.custom_op(
        f"mixers::{name}", mutates_args=(), schema="(Tensor[] tensors, bool diagonal) -> (Tensor, Tensor)"
    )
    def forward(tensors: list[Tensor], diagonal: bool) -> tuple[Tensor, Tensor]:
        result, memory = formulation(*tensors, diagonal=diagonal)
        return result.contiguous(), memory.clone(memory_format=torch.contiguous_format)

    @torch.library.custom_op(
        f"mixers::{name}_backward",
        mutates_args=(),
        schema="(Tensor[] tensors, bool diagonal, Tensor result, Tensor memory) -> Tensor[]",
    )
    def backward(tensors: list[Tensor], diagonal: bool, result: Tensor, memory: Tensor) -> list[Tensor]:
        # Inside a custom operator autograd is switched off in the dispatcher; its gradient needs it on.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):  # type: ignore[attr-defined]
            with torch.enable_grad():
                inputs = [t.detach().requires_grad_() for t in tensors]
                outputs = formulation(*inputs, diagonal=diagonal)
            gradients = torch.autograd.grad(
                outputs, inputs, (result, memory), allow_unused=True, materialize_grads=True
            )
        return [g.contiguous() for g in gradients]

    @forward.register_fake
    def _(tensors: list[Tensor], diagonal: bool) -> tuple[Tensor, Tensor]:
        return tensors[-2].new_empty(tensors[-2].shape), tensors[-1].new_empty(tensors[-1].shape)

    @backward.register_fake
    def _(tensors: list[Tensor], diagonal: bool, result: Tensor, memory: Tensor) -> list[Tensor]:
        return [t.new_empty(t.shape) for t in tensors]

    def setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.tensors, ctx.diagonal = inputs

    def gradient(ctx, result: Tensor, memory: Tensor):  # type: ignore[no-untyped-def]
        return backward(ctx.tensors, ctx.diagonal, result, memory), None

    forward.register_autograd(gradient, setup_context=setup)

    def run(*tensors: Tensor, diagonal: bool = True) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return forward(list(tensors), diagonal)
        return formulation(*tensors, diagonal=diagonal)

    return run
