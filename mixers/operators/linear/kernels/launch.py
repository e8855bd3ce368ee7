"""Shared by the kernels: feature maps on the device, precision of products, and how work is split into programs."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.precision import accumulation_dtype

PROGRAMS_PER_PROCESSOR = 4
LONGEST_SPLIT = 2**15  # tokens; beyond them the rounding error of one running float32 sum becomes visible


@triton.jit
def _elu_plus_one(x):
    return tl.where(x > 0, x + 1, tl.exp(tl.where(x > 0, 0.0, x)))  # minimum(x, 0) would swallow NaN


@triton.jit
def _elu_plus_one_slope(y):
    return tl.where(y > 1, 1.0, y)


@triton.jit
def _relu(x):
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _relu_slope(y):
    return tl.where(y > 0, 1.0, y)


@triton.jit
def _identity(x):
    return x


@triton.jit
def _identity_slope(y):
    return tl.where(y == y, 1.0, y)


FEATURES: dict[str, tuple[Any, Any]] = {
    "elu_plus_one": (_elu_plus_one, _elu_plus_one_slope),
    "relu": (_relu, _relu_slope),
    "identity": (_identity, _identity_slope),
}
"""φ, and φ′ as a function of φ(x), as device functions that kernels take as constexpr; NaN stays NaN.

The names are those of `mixers.feature_maps.FEATURE_MAPS`.
"""


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Return a @ b; for `tf32` the operands are rounded to nearest, where the hardware would truncate them."""
    if PRECISION == "tf32":
        result = tl.dot(_to_tf32(a), _to_tf32(b), input_precision="tf32")
    else:
        result = tl.dot(a, b, input_precision=PRECISION, out_dtype=a.dtype)
    return result


@triton.jit
def _to_tf32(x):
    # Adds half of the last TF32 bit before clearing the 13 bits that TF32 lacks; NaN and infinity stay.
    bits = x.to(tl.int32, bitcast=True)
    special = (bits & 0x7F800000) == 0x7F800000
    return tl.where(special, bits, (bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


def precisions(*tensors: Tensor) -> tuple[str, str]:
    """Return the `PRECISION` of matrix products: of those of values, and of those that end in differences.

    If all inputs are half precision, the former are products in TF32. TF32 has the mantissa of float16, longer than
    that of bfloat16, and the range of float32, so values of either type are exact in it, and rounding features loses no
    more than storing them in float16 would. The latter, gradients of features, are small differences of large sums.
    They, and all products of float32 inputs, are three TF32 products of the operands' upper and lower halves, with a
    relative error of about 2⁻²¹. Sums are float32. float64 stays float64.
    """
    if accumulation_dtype(*tensors) == torch.float64 or torch.version.hip:
        return "ieee", "ieee"
    half = all(t.dtype in (torch.float16, torch.bfloat16) for t in tensors)
    return ("tf32" if half else "tf32x3"), "tf32x3"


def alignment(*tensors: Tensor) -> int:
    """Return the largest power of two ≤ 16 that divides every stride in use, which bounds how far loads are vectorized.

    Kernels get it as a constexpr: Triton by itself recognizes only multiples of 16, and heads of 40 channels are
    aligned to 8. Unlike the strides, it does not depend on l.
    """
    strides = (s for t in tensors for s, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n > 1)
    return math.gcd(16, *strides)


def largest_tile(plain: str, dtype: torch.dtype) -> int:
    """Return the channels of a tile whose products fit the registers and 99 KiB of shared memory (GPUs since 2020).

    Args:
        plain: the first of `precisions`.
        dtype: of the sums.
    """
    return 128 if plain == "tf32" else 256 // dtype.itemsize


def tile(width: int, largest: int) -> int:
    """Return the channels of a head per tile: `largest` or half of it, whichever pads less, and no more than needed."""
    padding_least = min(largest, largest // 2, key=lambda size: -width % size)
    return min(max(16, triton.next_power_of_2(width)), padding_least)  # a matrix product needs at least 16


def split(length: int, block: int, others: int, device: torch.device) -> tuple[int, int]:
    """Return how to split a sequence for a sum over its tokens: (number of splits, tokens per split).

    Args:
        length: tokens.
        block: tokens that are read at once; splits are multiples of it.
        others: programs per split (batch, heads and tiles); 0 for an empty batch.
        device: its number of processors determines how many programs occupy it.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    splits = max(1, PROGRAMS_PER_PROCESSOR * processors // max(1, others))
    tokens = min(triton.cdiv(length, splits), LONGEST_SPLIT)
    tokens = triton.cdiv(tokens, block) * block
    return triton.cdiv(length, tokens), tokens
