"""The focused feature map: directions sharpened, norms kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers.precision import accumulation_dtype


class FocusedMap(nn.Module):
    """φ(x) = ‖u‖ · u^p / ‖u^p‖ with u = (ReLU(x) + 10⁻⁶) / softplus(scale): FLatten's map (2308.00442), positive.

    Powers are elementwise and norms over the full width h·k, before the heads are told apart, as published; queries
    and keys share one map. Computed in float32 at least, on u over its largest value, which changes nothing (the map
    of directions has degree 0) and lets no power overflow.

    Parameters:
        scale: (h·k,), learned, zeros at first.

    Args:
        key_dim: k, channels a head.
        power: p; 1 leaves directions as they are.
    """

    positive = True

    def __init__(self, heads: int, key_dim: int, power: float = 3.0) -> None:
        super().__init__()
        if power < 1:
            raise ValueError(f"Expected power ≥ 1, which sharpens; got {power}.")
        self.power = power
        self.scale = nn.Parameter(torch.zeros(heads * key_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, h, k) -> (b, l, h, k), same dtype, > 0 (in half precision ≥ 0)."""
        dtype = accumulation_dtype(x)
        u = (x.flatten(-2).to(dtype).relu() + 1e-6) / F.softplus(self.scale.to(dtype))
        sharp = (u / u.amax(-1, keepdim=True).detach()) ** self.power
        y = sharp * (u.norm(dim=-1, keepdim=True) / sharp.norm(dim=-1, keepdim=True))
        return y.view_as(x).to(x.dtype)
