"""Ways to run a UNet in less memory without changing its result, applied and removed in place.

| saving | what it does | what it costs |
|---|---|---|
| `activations` | SiLUs overwrite their input | nothing; a plan always uses it |
| `guidance` | runs the two halves of guidance one after the other, in the denoising loop | twice the kernel launches |
| `feed_forward` | runs feed-forward layers on chunks of tokens | more kernel launches |
| `skips` | keeps skip connections on the CPU | a copy to the CPU and back |

All of them are for inference: they raise if gradients are enabled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, SupportsIndex

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

SAVINGS = ("activations", "guidance", "feed_forward", "skips")
"""The savings in the order in which a plan adds them, the cheapest first."""

CHUNK_TOKENS = 4096  # of a feed-forward layer: enough to fill a GPU


@contextmanager
def save_memory(
    unet: UNet2DConditionModel, savings: Sequence[str], chunk_tokens: int = CHUNK_TOKENS, *, simulate: bool = False
) -> Iterator[None]:
    """Run `unet` with these savings inside; `guidance` concerns the denoising loop and has no effect here.

    Args:
        savings: some of `SAVINGS`.
        chunk_tokens: tokens that a feed-forward layer processes at a time.
        simulate: count memory without computing: tensors moved to the CPU then take none, even if the UNet is on it.

    Raises:
        ValueError: If a saving is unknown.
    """
    unknown = sorted(set(savings) - set(SAVINGS))
    if unknown:
        raise ValueError(f"Unknown saving {unknown[0]!r}: expected some of {', '.join(SAVINGS)}.")
    with ExitStack() as undo:
        for name in savings:
            if name in _APPLY:
                _APPLY[name](unet, undo, chunk_tokens, simulate)
        yield


class InPlaceSiLU(nn.Module):
    """SiLU that overwrites feature maps (b, c, h, w), but not the time embedding, which other layers also read."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x · sigmoid(x)."""
        _require_inference(x)
        return nn.functional.silu(x, inplace=x.ndim == 4)


class ChunkedFeedForward(FeedForward):
    """A feed-forward layer that processes `chunk_tokens` tokens at a time; the last chunk may be shorter."""

    chunk_tokens: int

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (b, l, d) to (b, l, d)."""
        _require_inference(hidden_states)
        result = torch.empty_like(hidden_states)
        chunks = hidden_states.split(self.chunk_tokens, 1)
        for chunk, target in zip(chunks, result.split(self.chunk_tokens, 1), strict=True):
            target.copy_(super().forward(chunk, *args, **kwargs))
        return result


class OffloadedTensors(tuple[Tensor, ...]):
    """Tensors on the CPU that move to `device` when indexed; a slice stays on the CPU."""

    device: torch.device

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        """Return one tensor on `device`, or a slice as `OffloadedTensors`."""
        selected: Any = super().__getitem__(index)
        return offloaded(selected, self.device) if isinstance(index, slice) else selected.to(self.device).contiguous()


def offloaded(tensors: Sequence[Tensor], device: torch.device) -> OffloadedTensors:
    """Wrap `tensors` as `OffloadedTensors` for `device`."""
    wrapped = OffloadedTensors(tensors)
    wrapped.device = device
    return wrapped


def _overwrite_activations(unet: nn.Module, undo: ExitStack, chunk_tokens: int, simulate: bool) -> None:
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D) and isinstance(block.nonlinearity, nn.SiLU):
            undo.callback(setattr, block, "nonlinearity", block.nonlinearity)
            block.nonlinearity = InPlaceSiLU()


def _chunk_feed_forward(unet: nn.Module, undo: ExitStack, chunk_tokens: int, simulate: bool) -> None:
    for layer in unet.modules():
        if type(layer) is FeedForward:
            undo.callback(_restore_feed_forward, layer)
            layer.__class__ = ChunkedFeedForward
            layer.chunk_tokens = chunk_tokens  # type: ignore[assignment]


def _restore_feed_forward(layer: nn.Module) -> None:
    layer.__class__ = FeedForward
    layer.__dict__.pop("chunk_tokens", None)


def _offload_skips(unet: UNet2DConditionModel, undo: ExitStack, chunk_tokens: int, simulate: bool) -> None:
    for block in getattr(unet, "down_blocks", ()):  # a transformer has no skip connections between levels
        undo.callback(block.register_forward_hook(_drop_skips if simulate else _move_skips_to_cpu).remove)
    for block in getattr(unet, "up_blocks", ()):
        undo.callback(block.register_forward_pre_hook(_fetch_skips, with_kwargs=True).remove)


def _move_skips_to_cpu(
    block: nn.Module, inputs: Any, output: tuple[Tensor, tuple[Tensor, ...]]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    sample, skips = output
    _require_inference(sample)
    return sample, tuple(skip.cpu() for skip in skips)


def _drop_skips(
    block: nn.Module, inputs: Any, output: tuple[Tensor, tuple[Tensor, ...]]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    sample, skips = output
    return sample, tuple(skip.new_empty(()).expand(skip.shape) for skip in skips)


def _fetch_skips(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    skips = offloaded(kwargs["res_hidden_states_tuple"], kwargs["hidden_states"].device)
    return args, {**kwargs, "res_hidden_states_tuple": skips}


def _require_inference(x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("save_memory is for inference only: run the UNet under torch.no_grad().")


_APPLY: dict[str, Callable[[Any, ExitStack, int, bool], None]] = {
    "activations": _overwrite_activations,
    "feed_forward": _chunk_feed_forward,
    "skips": _offload_skips,
}
