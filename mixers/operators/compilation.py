"""How operators appear in a compiled graph: loops over blocks are one node, whatever the number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
StatefulFunction = Callable[..., tuple[Tensor, Tensor]]
"""(*tensors, diagonal=…) -> (result, final memory)."""


def constant_in_graphs(function: FunctionT) -> FunctionT:
    """Mark a function whose result a compiled graph takes as a constant: it runs when the graph is traced.

    This is what `torch.compiler.assume_constant_result` does, without importing the compiler, and with it triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def as_graph_node(name: str, function: StatefulFunction) -> StatefulFunction:
    """Turn a function into a custom operator of torch while a graph is compiled; elsewhere it runs as it is.

    Args:
        name: of the operator, unique.
        function: (*tensors, diagonal=…) -> (result, memory), where the last tensor but one has the shape of the result
            and the last one that of the memory.

    Returns:
        A function with the same arguments and results. Its compiled gradient runs `function` a second time, which
        costs its time again and keeps only the tensors.
    """

    @torch.library.custom_op(
        f"mixers::{name}", mutates_args=(), schema="(Tensor[] tensors, bool diagonal) -> (Tensor, Tensor)"
    )
    def forward(tensors: list[Tensor], diagonal: bool) -> tuple[Tensor, Tensor]:
        result, memory = function(*tensors, diagonal=diagonal)
        return result.contiguous(), memory.clone(memory_format=torch.contiguous_format)

    @torch.library.custom_op(
        f"mixers::{name}_backward",
        mutates_args=(),
        schema="(Tensor[] tensors, bool diagonal, Tensor result, Tensor memory) -> Tensor[]",
    )
    def backward(tensors: list[Tensor], diagonal: bool, result: Tensor, memory: Tensor) -> list[Tensor]:
        # Inside a custom operator autograd is switched off in the dispatcher; the gradient needs it on.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):  # type: ignore[attr-defined]
            with torch.enable_grad():
                inputs = [t.detach().requires_grad_() for t in tensors]
                outputs = function(*inputs, diagonal=diagonal)
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
        return function(*tensors, diagonal=diagonal)

    return run
