"""Rotary position embeddings: channels are rotated by angles proportional to the position of their token."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.image_grid import ImageGrid, require_grid
from mixers.precision import accumulation_dtype, widest_dtype


def rotary(
    x: Tensor, *, base: float = 10000.0, adjacent: bool = True, start: int = 0, inclusive: bool = False
) -> Tensor:
    """Rotate channels by the position of the token in the sequence: (b, l, h, k) -> (b, l, h, k).

    Pair i of n = ⌊k/2⌋ rotates by t · base^(−i/n) at token t (RoFormer 2104.09864; fla), or by t · base^(−i/(n−1)) if
    `inclusive` (RetNet's code, torchscale). rotary(q)_s · rotary(k)_t depends on s − t only, and norms are preserved.
    If k is odd, the last channel is not rotated. Angles are float64; a call computes l·n sines and cosines, which all
    heads share.

    Args:
        x: queries or keys.
        base: of the geometric sequence of frequencies.
        adjacent: pairs are channels (2i, 2i + 1); otherwise (i, i + n), as in fla's layers.
        start: position of the first token, for streaming.
        inclusive: the last frequency is exactly 1/base.

    Raises:
        ValueError: k < 2.
    """
    positions = torch.arange(start, start + x.shape[1], device=x.device)
    return _rotate(x, [positions], base, adjacent, inclusive)


def rotary_2d(
    x: Tensor, grid: ImageGrid | None, *, base: float = 10000.0, adjacent: bool = True, inclusive: bool = False
) -> Tensor:
    """Rotate half of the channels by the row of the token and half by its column: (b, l, h, k) -> (b, l, h, k).

    With n = ⌊k/4⌋, pair i < n rotates by row · base^(−i/n), and pair n + i by column · base^(−i/n) (MILA 2405.16605),
    or with exponents −i/(n−1) if `inclusive` (RALA 2411.07635). rotary_2d(q)_s · rotary_2d(k)_t depends on the
    differences of rows and of columns only. The last k − 4n channels are not rotated: 2 of a head of 6. MILA rotates
    the full width before splitting heads: pass x as (b, l, 1, d).

    Args:
        x: queries or keys, in raster order.
        grid: (height, width) with height · width = l.
        base, adjacent, inclusive: as in `rotary`.

    Raises:
        ValueError: The grid is missing or does not fit, or k < 4.
    """
    _, width = require_grid(grid, x.shape[1], "A rotary embedding in two dimensions")
    positions = torch.arange(x.shape[1], device=x.device)
    return _rotate(x, [positions // width, positions % width], base, adjacent, inclusive)


def _rotate(x: Tensor, axes: list[Tensor], base: float, adjacent: bool, inclusive: bool = False) -> Tensor:
    n = x.shape[-1] // (2 * len(axes))
    if n == 0:
        raise ValueError(
            f"A rotary embedding needs heads of at least {2 * len(axes)} channels, got {x.shape[-1]} channels."
        )
    cos, sin = _cos_sin(axes, base ** (-_exponents(n, inclusive, x.device)), accumulation_dtype(x))
    rotated = 2 * n * len(axes)
    pairs = x[..., :rotated].to(cos.dtype).unflatten(-1, (-1, 2) if adjacent else (2, -1))
    pair_axis = -1 if adjacent else -2
    real, imaginary = pairs.unbind(pair_axis)
    result = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=pair_axis).flatten(-2)
    return torch.cat([result.to(x.dtype), x[..., rotated:]], dim=-1)


def _exponents(n: int, inclusive: bool, device: torch.device) -> Tensor:
    # float32 angles are off by 0.14 at 4 million tokens.
    return torch.arange(n, device=device, dtype=widest_dtype(device)) / (max(n - 1, 1) if inclusive else n)


def _cos_sin(axes: list[Tensor], frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions times frequencies, (l, 1, pairs) each."""
    angles = torch.cat([positions.to(frequencies.dtype)[:, None] * frequencies for positions in axes], dim=-1)
    angles = angles.remainder(2 * torch.pi).to(dtype)[:, None]
    return angles.cos(), angles.sin()
