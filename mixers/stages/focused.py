"""The feature map of focused linear attention: directions are sharpened, norms are kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers.precision import accumulation_dtype


class FocusedMap(nn.Module):
    """φ(x) = ‖u‖ · u^p / ‖u^p‖ with u = (ReLU(x) + 10⁻⁶) / softplus(scale): FLatten's positive map (2308.00442).

    Powers are elementwise, and norms are over the full width h·k, before the heads are split, as published; queries
    and keys share one map. Computed in float32 at least, on u divided by its largest entry: the map of directions has
    degree 0, so this changes nothing, and no power overflows.

    Parameters: `scale` (h·k,), learned, initially zero.

    Args:
        heads: number of heads h.
        key_dim: k, channels per head.
        power: p; 1 leaves directions unchanged.

    Raises:
        ValueError: power < 1.
    """

    def __init__(self, heads: int, key_dim: int, power: float = 3.0) -> None:
        super().__init__()
        if power < 1:
            raise ValueError(f"FocusedMap: expected power ≥ 1, which sharpens; got {power}.")
        self.power = power
        self.scale = nn.Parameter(torch.zeros(heads * key_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, l, h, k) to (b, l, h, k) in the same dtype, > 0 (≥ 0 in half precision)."""
        dtype = accumulation_dtype(x)
        u = (x.flatten(-2).to(dtype).relu() + 1e-6) / F.softplus(self.scale.to(dtype))
        sharpened = (u / u.amax(-1, keepdim=True).detach()) ** self.power
        y = sharpened * (u.norm(dim=-1, keepdim=True) / sharpened.norm(dim=-1, keepdim=True))
        return y.view_as(x).to(x.dtype)
