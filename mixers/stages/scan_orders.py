"""Scan orders: the orders in which a mixer reads the tokens of an image."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from mixers.image_grid import ImageGrid
from mixers.suggest import unknown_name


def _raster(height: int, width: int) -> Tensor:
    return torch.arange(height * width, device="cpu")


def _column(height: int, width: int) -> Tensor:
    return _raster(height, width).view(height, width).t().flatten()


def _zigzag(height: int, width: int) -> Tensor:
    positions = _raster(height, width).view(height, width).clone()
    positions[1::2] = positions[1::2].flip(1)
    return positions.flatten()


def _hilbert(height: int, width: int) -> Tensor:
    """Build the curve recursively. Blocks of equal size share one curve, rotated and shifted: O(l log l)."""
    curves: dict[tuple[int, int], Tensor] = {}

    def curve(long: int, short: int) -> Tensor:
        """Coordinates (2, long·short) along and across a block, from its corner (0, 0) to (long − 1, 0)."""
        if (long, short) not in curves:
            curves[long, short] = compute(long, short)
        return curves[long, short]

    def compute(long: int, short: int) -> Tensor:
        if min(long, short) == 1:
            line = torch.arange(long * short, device="cpu")
            return torch.stack([line, 0 * line] if short == 1 else [0 * line, line])
        if 2 * long > 3 * short:  # two blocks, one after the other
            half = _even_half(long)
            return torch.cat([curve(half, short), curve(long - half, short) + _at(half, 0)], dim=1)
        left = long // 2  # up the left side, along the top, down the right side
        low = _even_half(short)
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
"""Each scan, with the orders in which it reads the tokens, one pass each.

- `raster`: row by row, the order in which tokens arrive; needs no grid.
- `column`: column by column.
- `zigzag`: row by row, every second row backwards; consecutive tokens are always neighbors.
- `hilbert`: a Hilbert curve, generalized to rectangles by J. Červený's construction. Consecutive tokens are neighbors,
  except for at most one diagonal step if the longer side is odd and the shorter one even; tokens close in the image
  are mostly close in the order.
- `cross`: two passes, `raster` and `column`.
"""


def scan_orders(scan: str, grid: ImageGrid | None = None, device: torch.device | str = "cpu") -> list[Tensor | None]:
    """Return the orders of a scan: permutations (l,), int64, where order[i] is the raster index of the i-th token read.

    None stands for raster order, which permutes nothing. An order is computed once per grid and device, and copied for
    each caller; in a compiled graph it is one node, whatever the grid.

    Args:
        scan: a key of SCANS.
        grid: (height, width) of any rectangle; optional for `raster` only.
        device: device of the result.

    Raises:
        ValueError: The scan is unknown, or the grid is missing or has a side below 1.
    """
    if scan not in SCANS:
        raise ValueError(unknown_name("scan", scan, SCANS))
    if scan == "raster":
        return [None]
    if grid is None:
        raise ValueError(f"scan={scan!r} needs the size of the image: pass grid=(height, width), or use scan='raster'.")
    target = torch.device(device)
    return [None if name == "raster" else _scan_order(name, *grid, target) for name in SCANS[scan]]


def inverse_permutation(order: Tensor) -> Tensor:
    """Invert a permutation (l,), so that x[:, order][:, inverse_permutation(order)] equals x."""
    return torch.zeros_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))


# A custom operator is one node of a compiled graph, and the cache never holds the fake tensors of a tracer.
@torch.library.custom_op(
    "mixers::scan_order", mutates_args=(), schema="(str name, SymInt height, SymInt width, Device device) -> Tensor"
)
def _scan_order(name: str, height: int, width: int, device: torch.device) -> Tensor:
    return _cached(name, height, width, device).clone()  # a graph may overwrite the result of an operator


@_scan_order.register_fake
def _(name: str, height: int, width: int, device: torch.device) -> Tensor:
    return torch.empty(height * width, dtype=torch.int64, device=device)


@lru_cache(maxsize=64)
def _cached(name: str, height: int, width: int, device: torch.device) -> Tensor:
    if min(height, width) < 1:
        raise ValueError(f"Expected a grid (height, width) of at least 1 × 1, got {(height, width)}.")
    with torch.inference_mode(False):  # otherwise a later training step could not use it
        return _ORDERS[name](height, width).to(device)
