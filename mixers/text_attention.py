"""Softmax attention from image tokens to text, on its own and under one denominator with a linear mixer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mixers.context import TextTokens
from mixers.precision import accumulation_dtype, no_autocast


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Compute softmax(q kᵀ/√k) v with torch's fused kernels.

    Args:
        q: (b, l, h, k).
        k: (b, t, h, k).
        v: (b, t, h, v).
        visible: (b, t), False for keys that nobody sees; None: all are seen.

    Returns:
        (b, l, h, v). Costs O(l·t) time.
    """
    mask = None if visible is None else visible[:, None, None]
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def attend_to_text(text: TextTokens) -> Tensor:
    """Compute the softmax attention of the image tokens to the text, (b, l, h, v)."""
    return attend(text.q, text.rotated_k, text.v, text.visible)


def share_denominator(numerator: Tensor, denominator: Tensor, text: TextTokens) -> Tensor:
    """Combine a linear mixer's sums with softmax attention to text under one denominator (2509.24899).

    y = (numerator + Σ_t exp(q·k_t/√k) v_t) / (denominator + Σ_t exp(q·k_t/√k)). Fused attention does not return its
    denominator Z. One more key, with score 0 and a value channel of its own, makes it return 1 / (1 + Z) beside
    Σ exp(…) v / (1 + Z), so that no exponential is computed that could overflow.

    Args:
        numerator: Σ φ(q)·φ(k_j) v_j over image tokens, (b, l, h, v), float32 at least.
        denominator: Σ φ(q)·φ(k_j), (b, l, h, 1).
        text: the text tokens.

    Returns:
        (b, l, h, v). Costs O(l·t) time.
    """
    dtype = accumulation_dtype(numerator)
    k = F.pad(text.rotated_k.to(dtype), (0, 0, 0, 0, 0, 1))
    v = F.pad(text.v.to(dtype), (0, 1, 0, 0, 0, 1))
    v[:, -1, :, -1] = 1
    visible = None if text.visible is None else F.pad(text.visible, (0, 1), value=True)
    with no_autocast(v):  # 1 / (1 + Z) in half precision would lose the share of the text
        attended = attend(text.q.to(dtype), k, v, visible)
    rest = attended[..., -1:]  # 1 / (1 + Z)
    return (rest * numerator + attended[..., :-1]) / (rest * denominator + 1 - rest)
