"""Rotary positions: channels turn by angles that grow with the token's place, so that q·k sees differences alone."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.precision import accumulation_dtype


def rotary(x: Tensor, *, base: float = 10000.0, adjacent: bool = True, start: int = 0) -> Tensor:
    """Turn channels by the token's number: (b, l, h, k) -> the same.

    Pair i of n = ⌊k/2⌋ turns by t · base^(−i/n) at token t (RoFormer 2104.09864; RetNet 2307.08621, as in fla).
    rotary(q)_s · rotary(k)_t depends on s − t alone, and norms stay. A last odd channel stays as it is. Angles are
    float32 at least; l·n sines and cosines a call, which heads share.

    Args:
        adjacent: pairs are channels (2i, 2i + 1); else (i, i + n), as in fla's layers.
        start: number of the first token, for a stream in parts.

    Raises:
        ValueError: k < 2.
    """
    places = torch.arange(start, start + x.shape[1], device=x.device)
    return _turn(x, [places], base, adjacent)


def rotary_2d(x: Tensor, grid: tuple[int, int] | None, *, base: float = 10000.0, adjacent: bool = True) -> Tensor:
    """Turn half of the channels by the token's row and half by its column: (b, l, h, k) -> the same, in raster order.

    With n = ⌊k/4⌋, pair i < n turns by row · base^(−i/n), and pair n + i by column · base^(−i/n) (MILA 2405.16605).
    rotary_2d(q)_s · rotary_2d(k)_t depends on the differences of rows and of columns alone. The last k − 4n channels
    stay as they are: 2 of a head of 6. MILA turns the full width before it splits the heads: that is x (b, l, 1, d).

    Args:
        grid: (height, width) with height · width = l.
        adjacent: as in `rotary`.

    Raises:
        ValueError: there is no grid, it does not fit, or k < 4.
    """
    if grid is None:
        raise ValueError("Rotary positions in two dimensions need the size of the image: pass grid=(height, width).")
    height, width = grid
    if height * width != x.shape[1]:
        raise ValueError(f"The grid {(height, width)} has {height * width} places for {x.shape[1]} tokens.")
    places = torch.arange(x.shape[1], device=x.device)
    return _turn(x, [places // width, places % width], base, adjacent)


def _turn(x: Tensor, axes: list[Tensor], base: float, adjacent: bool) -> Tensor:
    n = x.shape[-1] // (2 * len(axes))
    if n == 0:
        raise ValueError(f"Heads of {x.shape[-1]} channels are too small to turn: {2 * len(axes)} are needed.")
    dtype, turned = accumulation_dtype(x), 2 * n * len(axes)
    frequencies = base ** (-torch.arange(n, device=x.device, dtype=dtype) / n)
    angles = torch.cat([places.to(dtype)[:, None] * frequencies for places in axes], dim=-1)[:, None]  # (l, 1, pairs)
    cos, sin = angles.cos(), angles.sin()
    pairs = x[..., :turned].to(dtype).unflatten(-1, (-1, 2) if adjacent else (2, -1))
    side = -1 if adjacent else -2
    real, imaginary = pairs.unbind(side)
    result = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=side).flatten(-2)
    return torch.cat([result.to(x.dtype), x[..., turned:]], dim=-1)
