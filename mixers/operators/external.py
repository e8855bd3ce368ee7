"""Helpers for backends that call the kernels of other libraries: what these kernels cannot compute."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from mixers.operators.backend import OperatorCall

MOST_ELEMENTS = 2**31 - 1
"""The largest tensor that a kernel with 32-bit offsets can address."""

OptionalTensorT = TypeVar("OptionalTensorT", bound="Tensor | None")
CausalKernel = Callable[..., tuple[Tensor, Tensor]]


def refuses_tensors(call: OperatorCall, widest: int) -> str | None:
    """Return why kernels that compute in half precision or TF32 cannot take these tensors, or None if they can.

    Args:
        call: the call.
        widest: channels of the widest head that the kernels support.
    """
    tensors = {name: t for name, t in call.tensors.items() if t is not None}
    dtypes = {t.dtype for name, t in tensors.items() if name not in ("log_decay", "A", "dt", "beta")}
    if torch.float64 in dtypes:
        return "it has no float64"
    if torch.float32 in dtypes and os.environ.get("TRITON_F32_DEFAULT") != "ieee":
        return "it multiplies float32 in TF32; set TRITON_F32_DEFAULT=ieee before the start, or pass half precision"
    width = max(t.shape[-1] for t in tensors.values() if t.ndim == 4)
    if width > widest:
        return f"heads of {width} channels are wider than its {widest}"
    return refuses_size(call)


def refuses_size(call: OperatorCall) -> str | None:
    """Return why one item of the batch exceeds 32-bit offsets, or None; a large batch is split instead."""
    largest = max(t[0].numel() for t in call.tensors.values() if t is not None and t.ndim == 4)
    if largest <= MOST_ELEMENTS:
        return None
    return f"a batch item of {largest:,} elements exceeds its 32-bit offsets"


def first_derivatives_only(*tensors: OptionalTensorT) -> list[OptionalTensorT]:
    """Return a kernel's inputs such that differentiating their gradients raises RuntimeError instead of giving zero.

    The backward pass of a kernel returns tensors without a graph, which `create_graph=True` would take for constants.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return list(tensors)
    differentiated = [t for t in tensors if t is not None and t.requires_grad]
    views = iter(_FirstDerivatives.apply(*differentiated) if differentiated else ())
    return [t if t is None or not t.requires_grad else next(views) for t in tensors]


class _FirstDerivatives(torch.autograd.Function):
    """The identity on several tensors; gradients that have lost their graph cannot be differentiated."""

    @staticmethod
    def forward(ctx, *tensors):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        if not torch.is_grad_enabled():
            return gradients
        tensors = ctx.saved_tensors  # what the gradients depend on
        return tuple(g if g is None or g.requires_grad else _NoDerivative.apply(g, *tensors) for g in gradients)


class _NoDerivative(torch.autograd.Function):
    """The identity on the first tensor, which refuses to be differentiated by any."""

    @staticmethod
    def forward(ctx, x, *tensors):  # type: ignore[no-untyped-def]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        raise RuntimeError(
            "The kernels of fla and mamba_ssm have first derivatives only, and their gradients were differentiated: "
            "pass backend='chunked' for second derivatives."
        )


def split_batch(kernel: CausalKernel, streams: tuple[Tensor | None, ...], memory: Tensor) -> tuple[Tensor, Tensor]:
    """Call kernel(*streams, memory) on as few items of the batch at a time as 32-bit offsets require."""
    largest = max(t.numel() for t in streams if t is not None)
    items = max(1, memory.shape[0] * MOST_ELEMENTS // max(largest, 1))
    if items >= memory.shape[0]:
        return kernel(*streams, memory)
    parts = [[None] * -(-memory.shape[0] // items) if t is None else t.split(items) for t in streams]
    results = [kernel(*part, m) for *part, m in zip(*parts, memory.split(items), strict=True)]
    return torch.cat([y for y, _ in results]), torch.cat([m for _, m in results])
