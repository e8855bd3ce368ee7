"""Attention masks that hide padding: which tokens every token sees."""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN = -1e4
"""Scores to which this much or more is added count as hidden; diffusers adds −10,000."""


def find_visible(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Which tokens an attention mask shows: (b, l), or None if it shows all.

    Args:
        mask: None; or the same for every query, (b, 1, l) or (b, 1, 1, l): booleans, False for hidden tokens, or
            numbers to add to the scores, 0 or at most −10,000.
        batch: b.
        length: l.

    Raises:
        ValueError: the mask differs between queries, or adds other numbers, which only softmax attention can apply.
    """
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        visible = mask
    else:
        visible = mask == 0
        if not bool((visible | (mask <= HIDDEN)).all()):
            raise ValueError(
                "attention_mask adds numbers to the scores of softmax attention, which a mounted mixer does not have: "
                "pass a mask that hides padding, or unmount the adapter"
            )
    if bool(visible.all()):
        return None
    if visible.shape[-1] != length or any(size != 1 for size in visible.shape[1:-1]) or visible.ndim < 3:
        raise ValueError(
            f"attention_mask hides tokens and has shape {tuple(mask.shape)}: a mounted mixer supports masks that are "
            f"the same for every query, {(batch, 1, length)}. Call the model without it, or unmount the adapter"
        )
    return visible.reshape(-1, length).expand(batch, length)
