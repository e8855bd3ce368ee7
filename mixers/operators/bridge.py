"""What the bridges to other libraries share: passes by another's causal kernel, and what these kernels cannot do.

A bridge is a module with the functions of the formulations, `refuses`, and NARROW = True: it is handed half-precision
tensors as they are, since its kernels sum in float32 by themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from mixers.operators.choice import Problem

LARGEST = 2**31 - 1
"""Elements of a tensor that a kernel with 32-bit offsets can reach."""

Kernel = Callable[..., tuple[Tensor, Tensor]]


def refuses_tensors(problem: Problem, heads: int) -> str | None:
    """Why kernels in half precision or TF32, for heads of up to `heads` channels, cannot take these, or None."""
    tensors = {name: t for name, t in problem.tensors.items() if t is not None}
    kinds = {t.dtype for name, t in tensors.items() if name not in ("log_decay", "A", "dt", "beta")}
    if torch.float64 in kinds:
        return "it has no float64"
    if torch.float32 in kinds and os.environ.get("TRITON_F32_DEFAULT") != "ieee":
        return "it multiplies float32 in TF32; set TRITON_F32_DEFAULT=ieee before the start, or hand it half precision"
    widest = max(t.shape[-1] for name, t in tensors.items() if t.ndim == 4)
    if widest > heads:
        return f"heads of {widest} channels are wider than its {heads}"
    return refuses_size(problem)


def refuses_size(problem: Problem) -> str | None:
    """Why one item of the batch is too large for 32-bit offsets, or None; several are taken apart."""
    largest = max(t[0].numel() for t in problem.tensors.values() if t is not None and t.ndim == 4)
    return f"an item of {largest:,} numbers passes its 32-bit offsets" if largest > LARGEST else None


def in_parts(kernel: Kernel, streams: tuple[Tensor | None, ...], memory: Tensor) -> tuple[Tensor, Tensor]:
    """kernel(*streams, memory), with as few items of the batch at a time as 32-bit offsets need."""
    largest = max(t.numel() for t in streams if t is not None)
    at_once = max(1, memory.shape[0] * LARGEST // max(largest, 1))
    if at_once >= memory.shape[0]:
        return kernel(*streams, memory)
    splits = [[None] * -(-memory.shape[0] // at_once) if t is None else t.split(at_once) for t in streams]
    done = [kernel(*part, m) for *part, m in zip(*splits, memory.split(at_once), strict=True)]
    return torch.cat([y for y, _ in done]), torch.cat([m for _, m in done])


def later(x: Tensor) -> Tensor:
    """Every token's stream (b, l, …) moved to the next token; the first gets zeros.

    A causal pass over streams moved like this holds, at token i, the memory after token i − 1: read by the query that
    i's own decay and erasure were put into, it is a pass in which no token sees itself, with nothing to cancel.
    """
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
