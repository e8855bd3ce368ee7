"""Non-causal linear attention as Triton kernels with the feature map fused in, forward and backward.

M = mean_j φ(k_j) v_jᵀ and z = mean_j φ(k_j) are summed in two stages: every program sums a part of the sequence, then
the parts are added. Then y_i = φ(q_i) M / n_i with n_i = φ(q_i)·z + eps. There are no atomics, so the same call on the
same device gives bit-identical results. Backward, with a_i = dy_i / n_i and δ_i = dy_i·y_i, which is computed as
φ(q_i)·(M dy_i) / n_i, because a stored y is rounded and enters a small difference:

    dφ(q)_i = (M dy_i − δ_i z) / n_i      dM = mean_i φ(q_i) a_iᵀ       dz = −mean_i φ(q_i) δ_i / n_i
    dφ(k)_j = dM v_j + dz                 dv_j = dMᵀ φ(k_j)             (the mean over keys is in dM and dz)

Unnormalized, M is multiplied by scale·l, n_i is 1, and there is no z.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.operators.linear.kernels.launch import (
    FEATURES,
    alignment,
    largest_tile,
    precisions,
    product,
    split,
    tile,
)
from mixers.precision import accumulation_dtype

BLOCK = 64  # tokens of a matrix product

# Arguments that change with l; kernels are not compiled again for them.
_SIZES = ["length", "heads", "splits", "part", "blocks"]
_STRIDES = [f"{tensor}_{axis}" for tensor in ("x", "w", "y") for axis in "blh"]


@triton.jit
def _load(x, batch, head, rows, length, columns, WIDTH: tl.constexpr, x_b, x_l, x_h, ALIGN: tl.constexpr):
    """Load some tokens and channels of a head of x (b, l, h, ·); 0 beyond the last of either."""
    start = tl.multiple_of(batch * x_b + head * x_h, ALIGN)
    at = tl.multiple_of(rows.to(tl.int64) * x_l, ALIGN)[:, None] + columns[None, :]
    return tl.load(x + start + at, mask=(rows < length)[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _store(x, tile, batch, head, rows, length, columns, WIDTH: tl.constexpr, x_b, x_l, x_h, ALIGN: tl.constexpr):
    """Store a tile where `_load` reads it."""
    start = tl.multiple_of(batch * x_b + head * x_h, ALIGN)
    at = tl.multiple_of(rows.to(tl.int64) * x_l, ALIGN)[:, None] + columns[None, :]
    inside = (rows < length)[:, None] & (columns < WIDTH)[None, :]
    tl.store(x + start + at, tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _load_memory(memory, keys, values, K: tl.constexpr, V: tl.constexpr):
    """Load some keys and values of M (k, v); 0 beyond the last of either."""
    inside = (keys < K)[:, None] & (values < V)[None, :]
    return tl.load(memory + keys[:, None] * V + values[None, :], mask=inside, other=0.0)


@triton.jit
def _load_sums(memory, keys, K: tl.constexpr, V: tl.constexpr):
    """Load some keys of z (k,), which follows M in memory; 0 beyond the last."""
    return tl.load(memory + K * V + keys, mask=keys < K, other=0.0)


@triton.jit
def _block(memory, heads, blocks, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr):
    """Return the block of tokens of a program: batch, head, the tokens, and the memory of that head."""
    program = tl.program_id(0)
    head = program % heads
    batch = (program // heads // blocks).to(tl.int64)
    tokens = program // heads % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    return batch, head, tokens, memory + (batch * heads + head) * WIDTH


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def _mean(
    x, w, norms, deltas, partial, length, heads, splits, part,
    x_b: tl.int64, x_l: tl.int64, x_h: tl.int64, w_b: tl.int64, w_l: tl.int64, w_h: tl.int64,
    K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store a tile of partial[split, batch, head] = [mean φ(x_j) w_jᵀ, mean φ(x_j)] over a part of the tokens.

    With norms and deltas: [mean φ(x_j) w_jᵀ / n_j, mean −φ(x_j) δ_j / n_j].
    """
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    values = program % tiles_v * BLOCK_V + tl.arange(0, BLOCK_V)
    keys = program // tiles_v % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    group = program // (tiles_v * tiles_k)
    head = group % heads
    split_index = group // heads % splits
    batch = (group // heads // splits).to(tl.int64)

    dtype: tl.constexpr = partial.dtype.element_ty
    memory = tl.zeros((BLOCK_K, BLOCK_V), dtype)
    sums = tl.zeros((BLOCK_K,), dtype)
    share = 1.0 / length.to(dtype)
    for first in range(split_index * part, tl.minimum((split_index + 1) * part, length), BLOCK_L):
        tokens = first + tl.arange(0, BLOCK_L)
        features = FEATURE(_load(x, batch, head, tokens, length, keys, K, x_b, x_l, x_h, ALIGN).to(dtype))
        if NORMALIZE:
            weights = tl.where(tokens < length, 1.0, 0.0).to(dtype)
            if norms is not None:
                at = (batch * heads + head) * length + tokens
                features = features / tl.load(norms + at, mask=tokens < length, other=1.0)[:, None]
                weights = -tl.load(deltas + at, mask=tokens < length, other=0.0)
            sums += tl.sum(features * weights[:, None], 0) * share
        block = _load(w, batch, head, tokens, length, values, V, w_b, w_l, w_h, ALIGN).to(dtype)
        # The factor keeps the running sum out of the matrix units, which truncate additions instead of rounding.
        memory += product(tl.trans(features), block, PRECISION) * share

    groups = tl.num_programs(0) // (tiles_v * tiles_k * splits)
    out = partial + (split_index.to(tl.int64) * groups + batch * heads + head) * WIDTH
    inside = (keys < K)[:, None] & (values < V)[None, :]
    tl.store(out + keys[:, None] * V + values[None, :], memory, mask=inside)
    if NORMALIZE:  # every tile of v writes the same values
        tl.store(out + K * V + keys, sums, mask=keys < K)


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def _read(
    x, memory, y, length, heads, blocks,
    x_b: tl.int64, x_l: tl.int64, x_h: tl.int64, y_b: tl.int64, y_l: tl.int64, y_h: tl.int64,
    K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Store y_i = φ(x_i) M / n_i for a block of tokens; n_i = 1 if not normalized."""
    batch, head, tokens, memory = _block(memory, heads, blocks, WIDTH, BLOCK_L)
    dtype: tl.constexpr = memory.dtype.element_ty
    for first_v in range(0, V, BLOCK_V):
        values = first_v + tl.arange(0, BLOCK_V)
        mixed = tl.zeros((BLOCK_L, BLOCK_V), dtype)
        norm = tl.zeros((BLOCK_L,), dtype) + EPS
        for first_k in range(0, K, BLOCK_K):
            keys = first_k + tl.arange(0, BLOCK_K)
            features = FEATURE(_load(x, batch, head, tokens, length, keys, K, x_b, x_l, x_h, ALIGN).to(dtype))
            mixed += product(features, _load_memory(memory, keys, values, K, V), PRECISION)
            if NORMALIZE:
                norm += tl.sum(features * _load_sums(memory, keys, K, V)[None, :], 1)
        if NORMALIZE:
            mixed = mixed / norm[:, None]
        _store(y, mixed, batch, head, tokens, length, values, V, y_b, y_l, y_h, ALIGN)


@triton.jit
def _changes(
    w, memory, batch, head, tokens, length, keys, w_b, w_l, w_h,
    K: tl.constexpr, V: tl.constexpr, ALIGN: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return some keys of M w_i, for a block of tokens."""
    dtype: tl.constexpr = memory.dtype.element_ty
    changes = tl.zeros((tokens.shape[0], keys.shape[0]), dtype)
    for first in range(0, V, BLOCK_V):
        values = first + tl.arange(0, BLOCK_V)
        block = _load(w, batch, head, tokens, length, values, V, w_b, w_l, w_h, ALIGN).to(dtype)
        changes += product(block, tl.trans(_load_memory(memory, keys, values, K, V)), PRECISION)
    return changes


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def _query_gradient(
    x, w, memory, y, norms, deltas, length, heads, blocks,
    x_b: tl.int64, x_l: tl.int64, x_h: tl.int64, w_b: tl.int64, w_l: tl.int64, w_h: tl.int64,
    y_b: tl.int64, y_l: tl.int64, y_h: tl.int64,
    K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FEATURE: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Store y_i = (M w_i − δ_i z) / n_i · φ′(x_i), and n_i and δ_i (b, h, l), for a block of tokens."""
    batch, head, tokens, memory = _block(memory, heads, blocks, WIDTH, BLOCK_L)
    dtype: tl.constexpr = memory.dtype.element_ty
    norm = tl.zeros((BLOCK_L,), dtype) + EPS
    delta = tl.zeros((BLOCK_L,), dtype)
    changes = tl.zeros((BLOCK_L, BLOCK_K), dtype)
    for first in range(0, K, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)
        changes = _changes(w, memory, batch, head, tokens, length, keys, w_b, w_l, w_h, K, V, ALIGN, BLOCK_V, PRECISION)
        features = FEATURE(_load(x, batch, head, tokens, length, keys, K, x_b, x_l, x_h, ALIGN).to(dtype))
        norm += tl.sum(features * _load_sums(memory, keys, K, V)[None, :], 1)
        delta += tl.sum(features * changes, 1)
    delta = delta / norm
    for first in range(0, K, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)
        if K > BLOCK_K:  # otherwise they are still available
            changes = _changes(
                w, memory, batch, head, tokens, length, keys, w_b, w_l, w_h, K, V, ALIGN, BLOCK_V, PRECISION
            )
        gradient = (changes - delta[:, None] * _load_sums(memory, keys, K, V)[None, :]) / norm[:, None]
        features = FEATURE(_load(x, batch, head, tokens, length, keys, K, x_b, x_l, x_h, ALIGN).to(dtype))
        _store(y, gradient * SLOPE(features), batch, head, tokens, length, keys, K, y_b, y_l, y_h, ALIGN)
    at = (batch * heads + head) * length + tokens
    tl.store(norms + at, norm, mask=tokens < length)
    tl.store(deltas + at, delta, mask=tokens < length)


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def _gradient_of_sums(
    x, w, memory, y, length, heads, blocks,
    x_b: tl.int64, x_l: tl.int64, x_h: tl.int64, w_b: tl.int64, w_l: tl.int64, w_h: tl.int64,
    y_b: tl.int64, y_l: tl.int64, y_h: tl.int64,
    K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FEATURE: tl.constexpr, SLOPE: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store y_i = (M w_i + z) φ′(x_i) for a block of tokens; z = 0 if not normalized."""
    batch, head, tokens, memory = _block(memory, heads, blocks, WIDTH, BLOCK_L)
    dtype: tl.constexpr = memory.dtype.element_ty
    for first in range(0, K, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)
        gradient = _changes(
            w, memory, batch, head, tokens, length, keys, w_b, w_l, w_h, K, V, ALIGN, BLOCK_V, PRECISION
        )
        if NORMALIZE:
            gradient += _load_sums(memory, keys, K, V)[None, :]
        features = FEATURE(_load(x, batch, head, tokens, length, keys, K, x_b, x_l, x_h, ALIGN).to(dtype))
        _store(y, gradient * SLOPE(features), batch, head, tokens, length, keys, K, y_b, y_l, y_h, ALIGN)


def noncausal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, feature_map: str = "identity", normalize: bool, eps: float, scale: float
) -> Tensor:
    """Linear attention without an order (2006.16236); the feature map is applied when q and k are read.

    y_i = φ(q_i)·mean_j(φ(k_j) v_jᵀ) / (φ(q_i)·mean_j φ(k_j) + eps), or scale · Σ_j (φ(q_i)·φ(k_j)) v_j.

    Args:
        q: (b, l, h, k), before φ, of any floating dtype and strides; a last stride other than 1 costs a copy.
        k: likewise.
        v: (b, l, h, v), likewise.
        feature_map: a name in `mixers.feature_maps`.
        normalize: as in `linear_attention`.
        eps: as in `linear_attention`.
        scale: as in `linear_attention`.

    Returns:
        (b, l, h, v) in v's dtype. Features and sums are float32, float64 for float64 inputs; for half precision see
        `launch.precisions`. First derivatives only. O(l·k·v) time. Besides q, k, v, the result and the gradients it
        needs memory for a few k × v matrices per processor of the GPU, and 2·b·l·h numbers in the backward pass.

    Raises:
        KeyError: There is no such feature map.
    """
    y, _ = _attention(q, k, v, feature_map, normalize, eps, scale)
    return y


@torch.library.custom_op("mixers::noncausal_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, feature_map: str, normalize: bool, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the result, and the memory [M, z] (b, h, k·v + k) that it reads; unnormalized [M] (b, h, k·v)."""
    q, k, v = (_with_rows(t) for t in (q, k, v))
    feature, _ = FEATURES[feature_map]
    plain, _ = precisions(q, k, v)
    y = v.new_empty(v.shape)
    with torch.cuda.device_of(q):
        memory = _memory(k, v, feature, normalize, scale, plain, accumulation_dtype(q, k, v))
        grid, sizes = _blocks(q, v, memory, plain)
        strides = _strides(x=q, y=y)
        _read[grid](q, memory, y, **strides, **sizes, FEATURE=feature, PRECISION=plain, NORMALIZE=normalize, EPS=eps)
    return y, memory


@torch.library.custom_op("mixers::noncausal_attention_backward", mutates_args=())
def _gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Tensor,
    feature_map: str, normalize: bool, eps: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v."""
    dy, q, k, v = (_with_rows(t) for t in (dy, q, k, v))
    feature, slope = FEATURES[feature_map]
    plain, differences = precisions(q, k, v)
    features = {"FEATURE": feature, "SLOPE": slope, "PRECISION": differences}
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    norms_and_deltas: tuple[Tensor, ...] = ()
    with torch.cuda.device_of(q):
        grid, sizes = _blocks(q, v, memory, plain)
        strides = _strides(x=q, w=dy, y=dq)
        if normalize:
            shape = (q.shape[0], q.shape[2], q.shape[1])
            norms_and_deltas = (memory.new_empty(shape), memory.new_empty(shape))  # n_i and δ_i
            _query_gradient[grid](q, dy, memory, dq, *norms_and_deltas, **strides, **sizes, **features, EPS=eps)
        else:
            _gradient_of_sums[grid](q, dy, memory, dq, **strides, **sizes, **features, NORMALIZE=False)
        change = _memory(q, dy, feature, normalize, scale, plain, memory.dtype, *norms_and_deltas)
        strides = _strides(x=k, w=v, y=dk)
        _gradient_of_sums[grid](k, v, change, dk, **strides, **sizes, **features, NORMALIZE=normalize)
        strides = _strides(x=k, y=dv)
        _read[grid](k, change, dv, **strides, **sizes, FEATURE=feature, PRECISION=plain, NORMALIZE=False, EPS=eps)
    return dq, dk, dv


def _memory(
    x: Tensor, w: Tensor, feature: Any, normalize: bool, scale: float, plain: str, dtype: torch.dtype,
    norms: Tensor | None = None, deltas: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return [mean φ(x_j) w_jᵀ, mean φ(x_j)] (b, h, k·v + k) or, unnormalized, scale times the sum, (b, h, k·v)."""
    (batch, length, heads, key) = x.shape
    value = w.shape[-1]
    block_k, block_v = (tile(width, largest_tile(plain, dtype)) for width in (key, value))
    groups = batch * heads * triton.cdiv(key, block_k) * triton.cdiv(value, block_v)
    splits, part = split(length, BLOCK, groups, x.device)
    width = key * value + (key if normalize else 0)
    partial = torch.empty(splits, batch, heads, width, device=x.device, dtype=dtype)
    _mean[(groups * splits,)](
        x, w, norms, deltas, partial, length, heads, splits, part, **_strides(x=x, w=w), K=key, V=value, WIDTH=width,
        BLOCK_L=BLOCK, BLOCK_K=block_k, BLOCK_V=block_v, FEATURE=feature, NORMALIZE=normalize, PRECISION=plain,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    total = partial.sum(0)
    return total if normalize else total * (scale * length)


def _blocks(q: Tensor, v: Tensor, memory: Tensor, plain: str) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid and the sizes of a kernel over blocks of tokens."""
    (batch, length, heads, key) = q.shape
    value = v.shape[-1]
    largest = largest_tile(plain, memory.dtype)
    block_k = tile(key, largest)
    block_v = tile(value, min(BLOCK, largest))
    block_l = min(2 * BLOCK, BLOCK * largest // block_k)
    blocks = triton.cdiv(length, block_l)
    sizes = {"length": length, "heads": heads, "blocks": blocks, "K": key, "V": value, "WIDTH": memory.shape[-1]}
    tiles = {"BLOCK_L": block_l, "BLOCK_K": block_k, "BLOCK_V": block_v}
    return (batch * heads * blocks,), {**sizes, **tiles, "num_warps": 8, "num_stages": 1}


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Return the strides of (b, l, h, ·) tensors by the names of the kernels' arguments, and their alignment."""
    named = {f"{name}_{axis}": t.stride(i) for name, t in tensors.items() for i, axis in enumerate("blh")}
    return {**named, "ALIGN": alignment(*tensors.values())}


def _with_rows(x: Tensor) -> Tensor:
    """Return the tensor with its channels contiguous in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, feature_map: str, normalize: bool, eps: float, scale: float):  # type: ignore[no-untyped-def]
    (batch, _, heads, key) = q.shape
    value = v.shape[-1]
    width = key * value + (key if normalize else 0)
    return v.new_empty(v.shape), v.new_empty(batch, heads, width, dtype=accumulation_dtype(q, k, v))


@_gradients.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Tensor, *_: Any):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dy: Tensor, _: Tensor):  # type: ignore[no-untyped-def]
    return *_gradients(dy, *ctx.saved_tensors, *ctx.settings), None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_keep)
