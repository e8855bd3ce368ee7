"""Scans over blocks of tokens that are small enough for everything a block needs to stay in a core's cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mixers.function_transforms import needs_plain_operations
from mixers.operators.differentiation import differentiable_gradients, recomputed_gradients
from mixers.precision import no_autocast

BLOCK_ELEMENTS = 1 << 18
"""Elements of the largest tensor of a block, in float32 the size of a core's level-two cache; measured."""

BlockStep = Callable[..., tuple[Tensor, Tensor]]


def scan_blocks(
    step: BlockStep,
    block_length: int,
    streams: Sequence[Tensor],
    memory: Tensor,
    constants: Sequence[Tensor] = (),
    *,
    width: int | None = None,
    dtype: torch.dtype | None = None,
    backwards: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run a step on one block of tokens after another, each from the memory that the previous one leaves.

    The backward pass keeps the streams and one memory per block, and runs each block once more, the last one first.
    Second derivatives keep what every block computes.

    Args:
        step: (*streams of a block, memory before it, *constants) -> (result, memory after it).
        block_length: tokens per block; the last block may be shorter.
        streams: (b, l, …) each.
        memory: before the first block.
        constants: tensors that every block gets as a whole.
        width: channels of the result; None: as many as the last stream has.
        dtype: of the result; None: that of the last stream.
        backwards: start with the last block; reversing the order inside a block is up to the step.

    Returns:
        The results of all tokens in their order, and the memory after the final block.
    """
    length = streams[-1].shape[1]
    last = streams[-1]
    spans = [slice(start, start + block_length) for start in range(0, length, block_length)]
    spans = spans[::-1] if backwards else spans
    dtype = dtype or last.dtype
    if needs_plain_operations():
        return _scan_plainly(step, spans, dtype, len(streams), *streams, memory, *constants)
    shape = (*last.shape[:-1], last.shape[-1] if width is None else width)
    y, memory = _BlockScan.apply(step, spans, shape, dtype, len(streams), *streams, memory, *constants)
    return y, memory


def _scan_plainly(
    step: BlockStep, spans: list[slice], dtype: torch.dtype, n_streams: int, *tensors: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the scan in torch's own operations, which can be transformed and differentiated any number of times."""
    streams = tensors[:n_streams]
    memory = tensors[n_streams]
    constants = tensors[n_streams + 1 :]
    results = {}
    for span in spans:
        result, memory = step(*(t[:, span] for t in streams), memory, *constants)
        results[span.start] = result.to(dtype)
    return torch.cat([results[start] for start in sorted(results)], dim=1), memory


class _BlockScan(torch.autograd.Function):
    """The scan with recomputation, written out rather than with torch.utils.checkpoint.

    Results and gradients are allocated before the first block, so a block frees all it allocates. Small tensors that
    survive between large ones that are freed would fragment the heap, which then grows as if every state were kept.
    """

    @staticmethod
    def forward(ctx, step, spans, shape, dtype, n_streams, *tensors):  # type: ignore[no-untyped-def]
        streams = tensors[:n_streams]
        start = tensors[n_streams]
        constants = tensors[n_streams + 1 :]
        memory = start
        before = memory.new_empty(len(spans), *memory.shape)
        y = memory.new_empty(shape, dtype=dtype)
        for i, span in enumerate(spans):
            before[i] = memory
            y[:, span], memory = step(*(t[:, span] for t in streams), memory, *constants)
        ctx.save_for_backward(before, *tensors)
        ctx.step = step
        ctx.spans = spans
        ctx.dtype = dtype
        ctx.n_streams = n_streams
        return y, memory.clone()  # a view would keep all states of the last block alive

    @staticmethod
    def backward(ctx, dy, d_memory):  # type: ignore[no-untyped-def]
        before, *tensors = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[5:])
        with no_autocast(dy):
            if torch.is_grad_enabled():  # create_graph=True

                def scan(*tensors: Tensor) -> tuple[Tensor, Tensor]:
                    return _scan_plainly(ctx.step, ctx.spans, ctx.dtype, ctx.n_streams, *tensors)

                gradients = differentiable_gradients(scan, tensors, (dy, d_memory), needed)
            else:
                gradients = _scan_gradients(ctx, dy, d_memory, before, tensors, needed)
        return None, None, None, None, None, *gradients


def _scan_gradients(ctx, dy, d_memory, before, tensors, needed):  # type: ignore[no-untyped-def]
    """The gradients of all tensors that need one, in one pass over the blocks from the final one."""
    n_streams = ctx.n_streams
    streams = tensors[:n_streams]
    constants = tensors[n_streams + 1 :]
    # Every block but the first hands the gradient of its memory on to the block before it.
    indices = [i for i, need in enumerate(needed) if need or i == n_streams]
    totals = [torch.empty_like(t) for t in streams] + [d_memory] + [torch.zeros_like(t) for t in constants]
    for i, span in reversed(list(enumerate(ctx.spans))):
        block = (*(t[:, span] for t in streams), before[i], *constants)
        outputs = (dy[:, span], totals[n_streams])
        for n, part in zip(indices, recomputed_gradients(ctx.step, block, outputs, indices), strict=True):
            if n < n_streams:
                totals[n][:, span] = part
            elif n == n_streams:
                totals[n] = part
            else:
                totals[n] += part
    return tuple(total if need else None for total, need in zip(totals, needed, strict=True))
