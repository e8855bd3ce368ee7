"""A pass over the tokens, block after block, so that what a block needs stays in the cache of a core."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mixers.operators.common import full_precision

Step = Callable[..., tuple[Tensor, Tensor]]


def block_after_block(
    step: Step, tokens: int, streams: Sequence[Tensor], memory: Tensor, constants: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """What the steps give for all tokens, with the shape of the last stream, and the memory after the last.

    Keeps the tensors and one memory a block; gradients run each block once more, the last block first. First
    derivatives only.

    Args:
        step: (*streams of a block, memory before it, *constants) -> (result, memory after it).
        tokens: of a block.
        streams: (b, l, …) each.
        memory: before the first token.
        constants: what every block sees as a whole.
    """
    y, memory = _Blocks.apply(step, tokens, len(streams), *streams, memory, *constants)
    return y, memory


class _Blocks(torch.autograd.Function):
    """Written out rather than with torch.utils.checkpoint: results and gradients have their place before the first
    block, so a block frees all it allocates. Small tensors that stay between large ones that go fragment the heap,
    which then grows as if every state were kept.
    """

    @staticmethod
    def forward(ctx, step, tokens, over_tokens, *tensors):  # type: ignore[no-untyped-def]
        streams, memory, constants = tensors[:over_tokens], tensors[over_tokens], tensors[over_tokens + 1 :]
        length = streams[-1].shape[1]
        places = [slice(start, start + tokens) for start in range(0, length, tokens)]
        y, before = torch.empty_like(streams[-1]), memory.new_empty(len(places), *memory.shape)
        for i, place in enumerate(places):
            before[i] = memory
            y[:, place], memory = step(*(t[:, place] for t in streams), memory, *constants)
        ctx.save_for_backward(before, *streams, *constants)
        ctx.step, ctx.places, ctx.over_tokens = step, places, over_tokens
        return y, memory.clone()  # a view would keep all states of the last block alive

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, d_memory):  # type: ignore[no-untyped-def]
        before, *tensors = ctx.saved_tensors
        streams, constants = tensors[: ctx.over_tokens], tensors[ctx.over_tokens :]
        d_streams, d_constants = [torch.empty_like(t) for t in streams], [torch.zeros_like(t) for t in constants]
        with full_precision(dy):
            for i, place in reversed(list(enumerate(ctx.places))):
                block = [t[:, place] for t in streams]
                found = gradients(ctx.step, (*block, before[i], *constants), (dy[:, place], d_memory))
                d_memory = found[ctx.over_tokens]
                for whole, part in zip(d_streams, found, strict=False):
                    whole[:, place] = part
                for total, part in zip(d_constants, found[ctx.over_tokens + 1 :], strict=True):
                    total += part
        return None, None, None, *d_streams, d_memory, *d_constants


def gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of the inputs from those of the outputs: runs the function once more."""
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in inputs]
        results = function(*inputs)
    return torch.autograd.grad(results, inputs, outputs)
