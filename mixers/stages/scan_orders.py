"""The orders in which a mixer with an order reads the tokens of an image."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from mixers.suggest import hint


def _raster(height: int, width: int) -> Tensor:
    return torch.arange(height * width, device="cpu")


def _column(height: int, width: int) -> Tensor:
    return _raster(height, width).view(height, width).t().flatten()


def _zigzag(height: int, width: int) -> Tensor:
    places = _raster(height, width).view(height, width).clone()
    places[1::2] = places[1::2].flip(1)
    return places.flatten()


def _hilbert(height: int, width: int) -> Tensor:
    """Blocks of the same size are one curve, turned and shifted, so that few are ever computed: O(l log l)."""
    known: dict[tuple[int, int], Tensor] = {}

    def curve(long: int, short: int) -> Tensor:
        """(2, long·short) coordinates along and across a block, from its corner (0, 0) to (long − 1, 0)."""
        if (long, short) not in known:
            known[long, short] = compute(long, short)
        return known[long, short]

    def compute(long: int, short: int) -> Tensor:
        if min(long, short) == 1:
            line = torch.arange(long * short, device="cpu")
            return torch.stack([line, 0 * line] if short == 1 else [0 * line, line])
        if 2 * long > 3 * short:  # two blocks, one after the other
            half = _even_half(long)
            return torch.cat([curve(half, short), curve(long - half, short) + _at(half, 0)], dim=1)
        left, low = long // 2, _even_half(short)  # up the left side, along the top, down the right side
        up = curve(low, left).flip(0)
        along = curve(long, short - low) + _at(0, low)
        down = _at(long - 1, low - 1) - curve(low, long - left).flip(0)
        return torch.cat([up, along, down], dim=1)

    across = width >= height
    x, y = curve(width, height) if across else curve(height, width).flip(0)
    return y * width + x


def _even_half(n: int) -> int:
    return n // 2 + (n // 2 % 2 if n > 2 else 0)


def _at(along: int, across: int) -> Tensor:
    return torch.tensor([[along], [across]], device="cpu")


_ORDERS: dict[str, Callable[[int, int], Tensor]] = {
    "raster": _raster,
    "column": _column,
    "zigzag": _zigzag,
    "hilbert": _hilbert,
}

SCANS: dict[str, tuple[str, ...]] = {**{name: (name,) for name in _ORDERS}, "cross": ("raster", "column")}
"""Every scan -> the orders that it reads the tokens in, one pass each.

- `raster`: row by row, the order in which the tokens come; needs no grid.
- `column`: column by column.
- `zigzag`: row by row, every second row backwards: consecutive tokens are always neighbors.
- `hilbert`: a Hilbert curve, generalized to rectangles by J. Červený's construction: consecutive tokens are
  neighbors, but for at most one diagonal step where the longer side is odd and the shorter one even; and tokens that
  are near in the image are mostly near in the order.
- `cross`: two passes, `raster` and `column`.
"""


def scan_orders(
    scan: str, grid: tuple[int, int] | None = None, device: torch.device | str = "cpu"
) -> list[Tensor | None]:
    """The orders of a scan: permutations (l,), int64; order[i] is the raster place of the i-th token to be read.

    None stands for the raster order, which has nothing to permute. An order is computed once for a grid and device,
    and copied for each caller; in a compiled graph it is one node, whatever the grid.

    Args:
        scan: one of SCANS.
        grid: (height, width), any rectangle; only `raster` does without.
        device: of the result.

    Raises:
        ValueError: unknown scan; a grid that is needed and missing, or has a side below 1.
    """
    if scan not in SCANS:
        raise ValueError(f"Unknown scan {scan!r}: expected one of {', '.join(SCANS)}.{hint(scan, SCANS)}")
    if scan == "raster":
        return [None]
    if grid is None:
        raise ValueError(
            f"scan={scan!r} reads an image and has to know its size: pass grid=(height, width), "
            "with height · width = the number of tokens, or use scan='raster'."
        )
    where = torch.device(device)
    return [None if name == "raster" else _scan_order(name, *grid, where) for name in SCANS[scan]]


def inverse_permutation(order: Tensor) -> Tensor:
    """The permutation that undoes one: x[:, order][:, inverse_permutation(order)] is x. (l,) -> (l,), O(l)."""
    return torch.zeros_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))


# One node of a compiled graph, and safe under fake tensors: what the cache holds is always real.
@torch.library.custom_op(
    "mixers::scan_order", mutates_args=(), schema="(str name, SymInt height, SymInt width, Device device) -> Tensor"
)
def _scan_order(name: str, height: int, width: int, device: torch.device) -> Tensor:
    return _cached(name, height, width, device).clone()  # a graph may write over what an operator gave it


@_scan_order.register_fake
def _(name: str, height: int, width: int, device: torch.device) -> Tensor:
    return torch.empty(height * width, dtype=torch.int64, device=device)


@lru_cache(maxsize=64)
def _cached(name: str, height: int, width: int, device: torch.device) -> Tensor:
    if min(height, width) < 1:
        raise ValueError(f"Expected a grid (height, width) of at least 1 × 1, got {(height, width)}.")
    with torch.inference_mode(False):  # else it could not be used in training afterwards
        return _ORDERS[name](height, width).to(device)
