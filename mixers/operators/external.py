"""Helpers for backends that call the kernels of other libraries: what these kernels cannot compute."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixers.operators.backend import OperatorCall

MOST_ELEMENTS = 2**31 - 1
"""The largest tensor that a kernel with 32-bit offsets can address."""

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


def call_once_differentiable(kernel: Callable[..., tuple[Tensor, ...]], *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Call kernel(*inputs) so that differentiating its gradients raises RuntimeError.

    The backward passes of kernels return tensors without a graph. Under `create_graph=True` these would count as
    constants, and second derivatives would be wrong without an error.
    """
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in inputs):
        return kernel(*inputs)
    results: tuple[Tensor, ...] = _OnceDifferentiable.apply(kernel, *inputs)
    return results


class _OnceDifferentiable(torch.autograd.Function):
    """Runs a kernel with its own graph inside, which the backward pass reads."""

    @staticmethod
    def forward(ctx, kernel, *inputs):  # type: ignore[no-untyped-def]
        leaves = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in inputs]
        with torch.enable_grad():
            outputs = kernel(*leaves)
        ctx.leaves = leaves
        ctx.outputs = outputs
        return tuple(output.detach() for output in outputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        needed = [t for t in ctx.leaves if t is not None and t.requires_grad]
        pairs = [(o, g) for o, g in zip(ctx.outputs, gradients, strict=True) if o.requires_grad]
        with torch.enable_grad():
            computed = iter(
                torch.autograd.grad(
                    [output for output, _ in pairs],
                    needed,
                    [gradient for _, gradient in pairs],
                    retain_graph=True,
                    allow_unused=True,
                )
            )
        return None, *(None if t is None or not t.requires_grad else next(computed) for t in ctx.leaves)


def split_batch(kernel: CausalKernel, streams: tuple[Tensor | None, ...], memory: Tensor) -> tuple[Tensor, Tensor]:
    """Call kernel(*streams, memory) on as few items of the batch at a time as 32-bit offsets require."""
    largest = max(t.numel() for t in streams if t is not None)
    items = max(1, memory.shape[0] * MOST_ELEMENTS // max(largest, 1))
    if items >= memory.shape[0]:
        return kernel(*streams, memory)
    parts = [[None] * -(-memory.shape[0] // items) if t is None else t.split(items) for t in streams]
    results = [kernel(*part, m) for *part, m in zip(*parts, memory.split(items), strict=True)]
    return torch.cat([y for y, _ in results]), torch.cat([m for _, m in results])
