"""Ways to run a UNet in less memory that leave its result as it is; put in and taken out in place.

| saving | what it does | what it costs |
|---|---|---|
| `activations` | SiLUs overwrite their input | nothing: a plan always has it |
| `guidance` | the two halves of guidance one after the other (`denoise.Guide`) | launches twice as many kernels |
| `feed_forward` | feed-forward layers in parts of the tokens | launches more kernels |
| `skips` | skip connections wait on the CPU | a copy there and one back |

All of them are for inference: with gradients on they raise.
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
"""In the order in which a plan adds them, the cheapest first."""

CHUNK_TOKENS = 4096  # of a feed-forward layer: enough to fill a GPU


@contextmanager
def save_memory(
    unet: UNet2DConditionModel, savings: Sequence[str], chunk_tokens: int = CHUNK_TOKENS, *, pretend: bool = False
) -> Iterator[None]:
    """Run `unet` with these savings inside; `guidance` is the loop's and changes nothing here.

    Args:
        chunk_tokens: of a feed-forward layer at a time.
        pretend: nothing is computed, memory is counted: what waits on the CPU takes none, wherever the UNet is.

    Raises:
        ValueError: an unknown saving.
    """
    unknown = sorted(set(savings) - set(SAVINGS))
    if unknown:
        raise ValueError(f"Unknown saving {unknown[0]!r}: expected some of {', '.join(SAVINGS)}.")
    with ExitStack() as undo:
        for name in savings:
            if name in _PUT_IN:
                _PUT_IN[name](unet, undo, chunk_tokens, pretend)
        yield


class InPlaceSiLU(nn.Module):
    """SiLU that overwrites feature maps (b, c, h, w), and not the time embedding, which other layers read too."""

    def forward(self, x: Tensor) -> Tensor:
        """x · sigmoid(x)."""
        _no_gradients(x)
        return nn.functional.silu(x, inplace=x.ndim == 4)


class ChunkedFeedForward(FeedForward):
    """A feed-forward layer that takes `chunk_tokens` tokens at a time; any number may be left for the last part."""

    chunk_tokens: int

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(b, l, d) -> (b, l, d)."""
        _no_gradients(hidden_states)
        result = torch.empty_like(hidden_states)
        parts = zip(hidden_states.split(self.chunk_tokens, 1), result.split(self.chunk_tokens, 1), strict=True)
        for part, place in parts:
            place.copy_(super().forward(part, *args, **kwargs))
        return result


class OnCpu(tuple[Tensor, ...]):
    """Tensors that wait on the CPU and come to `device` when one is asked for; a slice waits on."""

    device: torch.device

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        """One tensor, brought over, or some, that still wait."""
        found: Any = super().__getitem__(index)
        return waiting(found, self.device) if isinstance(index, slice) else found.to(self.device).contiguous()


def waiting(tensors: Sequence[Tensor], device: torch.device) -> OnCpu:
    """`tensors` as an `OnCpu` for `device`."""
    made = OnCpu(tensors)
    made.device = device
    return made


def _in_place(unet: nn.Module, undo: ExitStack, chunk_tokens: int, pretend: bool) -> None:
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D) and isinstance(block.nonlinearity, nn.SiLU):
            undo.callback(setattr, block, "nonlinearity", block.nonlinearity)
            block.nonlinearity = InPlaceSiLU()


def _in_chunks(unet: nn.Module, undo: ExitStack, chunk_tokens: int, pretend: bool) -> None:
    for layer in unet.modules():
        if type(layer) is FeedForward:
            undo.callback(_back_to, layer, FeedForward)
            layer.__class__ = ChunkedFeedForward
            layer.chunk_tokens = chunk_tokens  # type: ignore[assignment]


def _back_to(layer: nn.Module, kind: type) -> None:
    layer.__class__ = kind
    layer.__dict__.pop("chunk_tokens", None)


def _skips_on_cpu(unet: UNet2DConditionModel, undo: ExitStack, chunk_tokens: int, pretend: bool) -> None:
    for block in unet.down_blocks:
        undo.callback(block.register_forward_hook(_forget if pretend else _send).remove)
    for block in unet.up_blocks:
        undo.callback(block.register_forward_pre_hook(_fetch, with_kwargs=True).remove)


def _send(
    block: nn.Module, inputs: Any, output: tuple[Tensor, tuple[Tensor, ...]]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    sample, skips = output
    _no_gradients(sample)
    return sample, tuple(skip.cpu() for skip in skips)


def _forget(
    block: nn.Module, inputs: Any, output: tuple[Tensor, tuple[Tensor, ...]]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    sample, skips = output
    return sample, tuple(skip.new_empty(()).expand(skip.shape) for skip in skips)


def _fetch(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    skips, sample = kwargs["res_hidden_states_tuple"], kwargs["hidden_states"]
    return args, {**kwargs, "res_hidden_states_tuple": waiting(skips, sample.device)}


def _no_gradients(x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("This UNet runs in little memory, which is for inference only: use torch.no_grad().")


_PUT_IN: dict[str, Callable[[Any, ExitStack, int, bool], None]] = {
    "activations": _in_place,
    "feed_forward": _in_chunks,
    "skips": _skips_on_cpu,
}
