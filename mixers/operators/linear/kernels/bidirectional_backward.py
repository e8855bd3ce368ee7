"""The gradients of bidirectional decayed linear attention, as Triton kernels.

With the factors f_i = 1 / (Σ_j W_ij + eps), unnormalized the scale, and e_i = f_i dy_i:

    dW_ij = e_i·v_j + s_i   with the shares s_i = −e_i·y_i, unnormalized 0
    dv = Wᵀ e     dq_ic = Σ_j dW_ij k_jc L_ijc     dk_jc = Σ_i dW_ij q_ic L_ijc     dg_tc = Σ P_ijc over pairs across t

with P_ijc = dW_ij q_ic k_jc L_ijc; pairs across t are those with j < t ≤ i or i ≤ t < j. Contributions of other chunks
come through two states from either side: that of the keys, Σ k_j v_jᵀ, and that of the queries, Σ q_i e_iᵀ, which
decays like Lᵀ. Pairs inside a chunk are split into halves again, and the sums of the gates' gradients stay inside a
half: a running sum over the whole sequence would lose small terms next to large ones.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mixers.operators.linear.kernels.chunks import (
    UNSPECIALIZED,
    chunk_states,
    decay_mask,
    decays,
    distances,
    half_decays,
    head_of,
    launch_sizes,
    load_gates,
    load_tokens,
    mix,
    running_sums,
    strides,
)
from mixers.operators.linear.kernels.launch import precisions, product, tile
from mixers.precision import accumulation_dtype


@triton.jit
def _across(rows, columns, SIZE: tl.constexpr):
    """Return the gates' gradient (c, n) from pairs between two halves of SIZE, given their sums by row and column.

    The gate of the row's token is between the two, that of the column's token is not.
    """
    both = rows + columns
    second = (tl.arange(0, rows.shape[0]) // SIZE % 2 == 1)[:, None]
    return tl.where(second, running_sums(both, SIZE, True), running_sums(both, SIZE, False)) - columns


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _gradients(
    r, x, w, y, g, factors, shares, key_states, key_sums, query_states, query_sums, chunk_gate, dq, dk, dg,
    length, heads, chunks,
    r_b: tl.int64, r_l: tl.int64, r_h: tl.int64, r_c, x_b: tl.int64, x_l: tl.int64, x_h: tl.int64, x_c,
    w_b: tl.int64, w_l: tl.int64, w_h: tl.int64, w_c, y_b: tl.int64, y_l: tl.int64, y_h: tl.int64, y_c,
    g_b: tl.int64, g_l: tl.int64, g_h: tl.int64, g_c,
    K: tl.constexpr, V: tl.constexpr, LEVELS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SCALAR: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Store dq, dk and dg (b, l, h, k) for the tokens of a chunk and a tile of channels; r is q, x k, w v, y dy.

    With one gate per token, dg is (tiles of k, b, l, h, 1), one part per tile.
    """
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0).to(tl.int64)
    tile_k = program % tiles_k
    chunk_index = program // tiles_k
    chunk = chunk_index % chunks
    head = chunk_index // chunks % heads
    batch = chunk_index // chunks // heads
    dtype: tl.constexpr = key_states.dtype.element_ty
    C: tl.constexpr = 1 << LEVELS
    tokens = chunk * C + tl.arange(0, C)
    inside = tokens < length
    keys = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    valid = keys < K

    # Contributions of other chunks: `_left` of those before this one, `_right` of those after it.
    w = head_of(w, batch, head, w_b, w_h, ALIGN)
    y = head_of(y, batch, head, y_b, y_h, ALIGN)
    row = (batch * length + tokens) * heads + head
    factor = tl.load(factors + row, mask=inside, other=0.0)[:, None]
    d_weights = tl.zeros((C, C), dtype)
    dq_left = tl.zeros((C, BLOCK_K), dtype)
    dq_right = tl.zeros((C, BLOCK_K), dtype)
    dk_left = tl.zeros((C, BLOCK_K), dtype)
    dk_right = tl.zeros((C, BLOCK_K), dtype)
    through = tl.zeros((BLOCK_K,), dtype)  # pairs of a token before this chunk and one after it
    for first in range(0, V, BLOCK_V):
        values = first + tl.arange(0, BLOCK_V)
        errors = load_tokens(y, tokens, values, length, y_l, y_c, V, ALIGN, dtype) * factor
        v = load_tokens(w, tokens, values, length, w_l, w_c, V, ALIGN, dtype)
        d_weights += product(errors, tl.trans(v), PRECISION)
        at = chunk_index * 2 * K * V + keys[:, None] * V + values[None, :]
        inner = valid[:, None] & (values < V)[None, :]
        key_left = tl.load(key_states + at, mask=inner, other=0.0)
        query_right = tl.load(query_states + at + K * V, mask=inner, other=0.0)
        dq_left += product(errors, tl.trans(key_left), PRECISION)
        dk_right += product(v, tl.trans(query_right), PRECISION)
        through += tl.sum(key_left * query_right, 1)
        key_right = tl.load(key_states + at + K * V, mask=inner, other=0.0)
        query_left = tl.load(query_states + at, mask=inner, other=0.0)
        dq_right += product(errors, tl.trans(key_right), PRECISION)
        dk_left += product(v, tl.trans(query_left), PRECISION)
        through += tl.sum(key_right * query_left, 1)
    if key_sums is not None:
        share = tl.load(shares + row, mask=inside, other=0.0)[:, None]
        at = chunk_index * 2 * K + keys
        key_left = tl.load(key_sums + at, mask=valid, other=0.0)
        key_right = tl.load(key_sums + at + K, mask=valid, other=0.0)
        query_left = tl.load(query_sums + at, mask=valid, other=0.0)
        query_right = tl.load(query_sums + at + K, mask=valid, other=0.0)
        d_weights += share
        dq_left += share * key_left[None, :]
        dq_right += share * key_right[None, :]
        dk_left += query_left[None, :]
        dk_right += query_right[None, :]
        through += key_left * query_right + key_right * query_left

    channels = tl.arange(0, 1) if SCALAR else keys
    gates: tl.constexpr = 1 if SCALAR else K
    gates_align: tl.constexpr = 1 if SCALAR else ALIGN
    g = head_of(g, batch, head, g_b, g_h, gates_align)
    own, before, after = load_gates(g, tokens, channels, length, g_l, g_c, gates, gates_align, dtype)
    q = load_tokens(head_of(r, batch, head, r_b, r_h, ALIGN), tokens, keys, length, r_l, r_c, K, ALIGN, dtype)
    k = load_tokens(head_of(x, batch, head, x_b, x_h, ALIGN), tokens, keys, length, x_l, x_c, K, ALIGN, dtype)
    since, until = decays(own, before, after, C, True)
    dq_left *= since
    dq_right *= until
    since, until = decays(own, before, after, C, False)
    dk_left *= since
    dk_right *= until
    decay = tl.load(chunk_gate + chunk_index * gates + channels, mask=channels < gates, other=0.0)
    left = q * dq_left + k * dk_left
    right = q * dq_right + k * dk_right
    columns = k * (dk_left + dk_right)
    passing = (through * decay)[None, :]
    if SCALAR:
        left, right = tl.sum(left, 1)[:, None], tl.sum(right, 1)[:, None]
        columns, passing = tl.sum(columns, 1)[:, None], tl.sum(passing, 1)[:, None]
    d_gates = running_sums(left, C, True) + running_sums(right, C, False) - columns + passing
    d_queries = dq_left + dq_right
    d_keys = dk_left + dk_right

    # Contributions of pairs inside the chunk.
    apart = distances(C)
    if SCALAR:
        masked = d_weights * decay_mask(own, before, after, LEVELS, False)
        d_queries += product(masked, k, PRECISION)
        d_keys += product(tl.trans(masked), q, PRECISION)
        pairs = masked * product(q, tl.trans(k), PRECISION)
        for level in tl.static_range(LEVELS):
            crossing = tl.where(apart >> level == 1, pairs, 0.0)
            d_gates += _across(tl.sum(crossing, 1)[:, None], tl.sum(crossing, 0)[:, None], 1 << level)
    else:
        diagonal = tl.sum(tl.where(apart == 0, d_weights, 0.0), 1)[:, None]
        d_queries += diagonal * k
        d_keys += diagonal * q
        for level in tl.static_range(LEVELS):
            crossing = tl.where(apart >> level == 1, d_weights, 0.0)
            row_decays = half_decays(own, before, after, 1 << level, True)
            column_decays = half_decays(own, before, after, 1 << level, False)
            dq_level = product(crossing, k * column_decays, PRECISION) * row_decays
            dk_level = product(tl.trans(crossing), q * row_decays, PRECISION) * column_decays
            d_queries += dq_level
            d_keys += dk_level
            d_gates += _across(q * dq_level, k * dk_level, 1 << level)

    out = row[:, None] * K + keys[None, :]
    tl.store(dq + out, d_queries.to(dq.dtype.element_ty), mask=inside[:, None] & valid[None, :])
    tl.store(dk + out, d_keys.to(dk.dtype.element_ty), mask=inside[:, None] & valid[None, :])
    if SCALAR:
        dg += tile_k * (tl.num_programs(0) // (tiles_k * chunks * heads)) * length * heads
    out = row[:, None] * gates + channels[None, :]
    tl.store(dg + out, d_gates, mask=inside[:, None] & (channels < gates)[None, :])


def gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, normalize: bool, eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv and dg of `bidirectional_attention`, from its inputs and dy (b, l, h, v)."""
    dtype = accumulation_dtype(q, k, v)
    plain, differences = precisions(q, k, v)
    exact: dict[str, Any] = {"g": g, "dtype": dtype, "PRECISION": differences}
    key_states, key_sums, chunk_gate = chunk_states(k, v, normalize, **exact)
    factors = dy.new_full(dy.shape[:-1], scale, dtype=dtype)
    shares = None
    if normalize:
        # Shares enter small differences, so y is computed again: a stored one would be rounded.
        y = dy.new_empty(dy.shape, dtype=dtype)
        factors = mix(q, k, v, key_states, key_sums, y, EPS=eps, **exact)
        shares = -(y.mul_(dy).sum(-1) * factors)
        del y
    query_states, query_sums, _ = chunk_states(q, dy, normalize, factors, shares, **exact)
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    mix(k, q, dy, query_states, None, dv, factors, g=g, dtype=dtype, PRECISION=plain)

    batch, _, heads, key = q.shape
    sizes = launch_sizes(q, v, g, dtype, q, k, v, dy)
    block_k = 16  # channels that fit the registers
    tiles = triton.cdiv(key, block_k)
    dg = g.new_empty(tiles if sizes["SCALAR"] else 1, *g.shape, dtype=dtype)
    _gradients[(batch * heads * sizes["chunks"] * tiles,)](
        q, k, v, dy, g, factors, shares, key_states, key_sums, query_states, query_sums, chunk_gate, dq, dk, dg,
        **strides(r=q, x=k, w=v, y=dy, g=g), **sizes, BLOCK_K=block_k, BLOCK_V=tile(v.shape[-1], 32),
        PRECISION=differences,
    )  # fmt: skip
    return dq, dk, dv, dg.sum(0).to(g.dtype)
