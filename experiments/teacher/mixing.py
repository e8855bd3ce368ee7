"""Controls for self-attention in a UNet: the same values and output projections, but a mixing matrix that is fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor


class FixedMixing:
    """An attention processor that applies one fixed map to the values (b, l, d) instead of softmax attention.

    It also trains: gradients reach the value and output projections.

    Args:
        mix: from values to mixed values.
    """

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        self._mix = mix

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Tokens (b, l, d) -> tokens (b, l, d)."""
        out: Tensor = attn.to_out[0](self._mix(attn.to_v(hidden_states)))
        return out


CONTROLS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda values: values,
    "uniform": lambda values: values.mean(dim=1, keepdim=True).expand_as(values),
    "zero": torch.zeros_like,
}
"""Name -> map of the values: W = I, W = 1/l, W = 0."""


def fix_mixing(unet: UNet2DConditionModel, control: str) -> None:
    """Replace the mixing of every self-attention of `unet` by one of `CONTROLS`; cross-attention stays."""
    processor = FixedMixing(CONTROLS[control])
    names = {n: processor if ".attn1." in n else p for n, p in unet.attn_processors.items()}
    unet.set_attn_processor(names)


@contextmanager
def fixed_mixing(unet: UNet2DConditionModel, control: str) -> Iterator[None]:
    """Within the block, every self-attention of `unet` has the mixing of one of `CONTROLS`."""
    before = dict(unet.attn_processors)
    fix_mixing(unet, control)
    try:
        yield
    finally:
        unet.set_attn_processor(before)
