"""One table of tolerances, used by every comparison in the suite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """|a − b| ≤ absolute + relative · max|b|."""

    relative: float
    absolute: float


TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-10, 1e-12),  # conditioned inputs: only rounding, a few thousand operations
    torch.float32: Tolerance(1e-4, 1e-6),  # sums of a thousand terms in another order
    torch.bfloat16: Tolerance(5e-2, 5e-3),  # 8 bits of mantissa through three projections
    torch.float16: Tolerance(1e-2, 1e-3),  # 11 bits, likewise
}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, what: str = "result") -> None:
    """Compare at the tolerance of `dtype` (default: that of `actual`); the message says where they differ most.

    Raises:
        AssertionError: Shapes differ, a value is not finite, or the tensors differ by more than allowed.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    tolerance = TOLERANCES[dtype or actual.dtype]
    a = actual.detach().double()
    b = expected.detach().double()
    assert a.isfinite().all(), f"{what}: {int((~a.isfinite()).sum())} of {a.numel()} values are not finite"
    if a.numel() == 0:
        return
    error = (a - b).abs()
    allowed = tolerance.absolute + tolerance.relative * b.abs().max()
    if error.max() > allowed:
        index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(f"{what}: differs by {error.max():.3g} at {index}; {allowed:.3g} is allowed")
