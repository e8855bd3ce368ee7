"""A pass over the tokens, block after block, so that what a block needs stays in the cache of a core."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mixers.precision import no_autocast

Step = Callable[..., tuple[Tensor, Tensor]]

MAPPED = (1 << 25) - (1 << 16)  # bytes, below the 32 MiB up to which the GNU C library learns
torch.empty(MAPPED, dtype=torch.uint8, device="cpu")
"""Freed at once, and never touched: from a mapping that is freed, the C library learns to keep tensors up to its size,
and twice as much at the end of its heap. Before, it gives them back to the system, which clears their pages at every
first touch: a third of the time of a Mamba-2 block. Where mallopt or MALLOC_… have told it otherwise it does not."""


def block_after_block(
    step: Step,
    tokens: int,
    streams: Sequence[Tensor],
    memory: Tensor,
    constants: Sequence[Tensor] = (),
    *,
    width: int | None = None,
    dtype: torch.dtype | None = None,
    backwards: bool = False,
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
        width, dtype: of the result, where they are not the last stream's.
        backwards: the last block comes first; the order inside a block is the step's to turn.
    """
    length, last = streams[-1].shape[1], streams[-1]
    places = [slice(start, start + tokens) for start in range(0, length, tokens)][:: -1 if backwards else 1]
    shape = (*last.shape[:-1], last.shape[-1] if width is None else width)
    y, memory = _Blocks.apply(step, places, (shape, dtype or last.dtype), len(streams), *streams, memory, *constants)
    return y, memory


class _Blocks(torch.autograd.Function):
    """Written out rather than with torch.utils.checkpoint: results and gradients have their place before the first
    block, so a block frees all it allocates. Small tensors that stay between large ones that go fragment the heap,
    which then grows as if every state were kept.
    """

    @staticmethod
    def forward(ctx, step, places, result, over_tokens, *tensors):  # type: ignore[no-untyped-def]
        streams, memory, constants = tensors[:over_tokens], tensors[over_tokens], tensors[over_tokens + 1 :]
        (shape, dtype), before = result, memory.new_empty(len(places), *memory.shape)
        y = memory.new_empty(shape, dtype=dtype)
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
        needed = list(ctx.needs_input_grad[4:])
        needed[ctx.over_tokens] = True  # the memory: what a block leaves to the next
        wanted = [place for place, need in enumerate(needed) if need]
        found = [torch.empty_like(t) for t in streams] + [d_memory] + [torch.zeros_like(t) for t in constants]
        with no_autocast(dy):
            for i, place in reversed(list(enumerate(ctx.places))):
                block = (*(t[:, place] for t in streams), before[i], *constants)
                outputs = (dy[:, place], found[ctx.over_tokens])
                for n, part in zip(wanted, gradients(ctx.step, block, outputs, wanted), strict=True):
                    if n < ctx.over_tokens:
                        found[n][:, place] = part
                    elif n == ctx.over_tokens:
                        found[n] = part
                    else:
                        found[n] += part
        return None, None, None, None, *(t if need else None for t, need in zip(found, needed, strict=True))


def gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    wanted: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of those inputs whose places are wanted, from those of the outputs: runs the function once more."""
    wanted = range(len(inputs)) if wanted is None else wanted
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_(place in wanted) for place, t in enumerate(inputs)]
        results = function(*inputs)
    return torch.autograd.grad(results, [inputs[place] for place in wanted], outputs)
