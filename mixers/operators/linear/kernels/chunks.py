"""Triton kernels over chunks of c tokens, decayed in both directions at once.

1. `_chunk_states`: every chunk by itself sums its keys and values twice, decayed to its end and to its start.
2. `_carry`: a scan over the chunks in either direction: what comes into a chunk from the left, and from the right.
3. `_mix`: every chunk reads both states, adds its own c × c part of W, divides and writes y.

Tokens are thus read twice, where two scans would read them four times. Inside a chunk W is split into halves. For
tokens of a block whose second half starts at m, with rows that decay by their own gate and columns that do not,

    row factor      i ≥ m: exp(Σ_{t=m..i} g_t)        i < m: exp(Σ_{t=i..m−1} g_t)
    column factor   j ≥ m: exp(Σ_{t=m..j−1} g_t)      j < m: exp(Σ_{t=j+1..m−1} g_t)

row times column is L_ij for i and j in different halves, below the diagonal and above it. Every exponent is ≤ 0 and
summed by itself. With one gate per channel each level is a product of (c, k) matrices, both directions at once; with
one gate per token the levels make up the mask of a single product.

In Lᵀ rows and columns exchange roles, so the same kernels compute dV = Wᵀ E, with queries in the place of keys and the
other factor for each (`TRANSPOSED`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.operators.linear.kernels.launch import alignment, product, tile

LEVELS = 6  # of halves: chunks of 64 tokens
FEW_LEVELS = 5  # chunks of 32: with one gate per channel every level is a product, and float64 needs twice the space
CARRIED = 256  # elements of a state that one program of the scan carries

# Arguments that change with l; kernels are not compiled again for them.
UNSPECIALIZED = ["length", "heads", "chunks", *(f"{tensor}_{axis}" for tensor in "rxwgy" for axis in "blh")]


@triton.jit
def head_of(x, batch, head, x_b, x_h, ALIGN: tl.constexpr):
    """Return the address of a head of x (b, l, h, ·)."""
    return x + tl.multiple_of(batch * x_b + head * x_h, ALIGN)


@triton.jit
def load_tokens(x, tokens, channels, length, x_l, x_c, WIDTH: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr):
    """Load (tokens, channels) of a head; 0 outside, which adds nothing and decays nothing."""
    at = tl.multiple_of(tokens * x_l, ALIGN)[:, None] + channels[None, :] * x_c
    inside = ((tokens >= 0) & (tokens < length))[:, None] & (channels < WIDTH)[None, :]
    return tl.load(x + at, mask=inside, other=0.0).to(DTYPE)


@triton.jit
def load_gates(g, tokens, channels, length, g_l, g_c, WIDTH: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr):
    """Load the log decays of tokens, of the tokens before them, and of those after them."""
    own = load_tokens(g, tokens, channels, length, g_l, g_c, WIDTH, ALIGN, DTYPE)
    before = load_tokens(g, tokens - 1, channels, length, g_l, g_c, WIDTH, ALIGN, DTYPE)
    after = load_tokens(g, tokens + 1, channels, length, g_l, g_c, WIDTH, ALIGN, DTYPE)
    return own, before, after


@triton.jit
def running_sums(x, SIZE: tl.constexpr, REVERSE: tl.constexpr):
    """Return sums (c, n) from the start of every block of SIZE rows through each row, or from it to the end."""
    if SIZE > 1:
        blocks = tl.reshape(x, (x.shape[0] // SIZE, SIZE, x.shape[1]))
        x = tl.reshape(tl.cumsum(blocks, 1, reverse=REVERSE), (x.shape[0], x.shape[1]))
    return x


@triton.jit
def decays(own, before, after, SIZE: tl.constexpr, OWN: tl.constexpr):
    """Return the decays from the start of a token's block of SIZE to it, and from it to the end, with its gate if OWN.

    Without it the neighbors' gates are summed: a difference would lose small ones next to a large one.
    """
    if OWN:
        since = running_sums(own, SIZE, False)
        until = running_sums(own, SIZE, True)
    else:
        position = tl.arange(0, own.shape[0])[:, None] % SIZE
        since = running_sums(tl.where(position == 0, 0.0, before), SIZE, False)
        until = running_sums(tl.where(position == SIZE - 1, 0.0, after), SIZE, True)
    return tl.exp(since), tl.exp(until)


@triton.jit
def half_decays(own, before, after, SIZE: tl.constexpr, OWN: tl.constexpr):
    """Return the decays between tokens and the middle of their block, which has two halves of SIZE."""
    since, until = decays(own, before, after, SIZE, OWN)
    return tl.where((tl.arange(0, own.shape[0]) // SIZE % 2 == 1)[:, None], since, until)


@triton.jit
def distances(C: tl.constexpr):
    """Return i xor j, (c, c), whose highest bit is the level at which i and j are in different halves."""
    token = tl.arange(0, C)
    return token[:, None] ^ token[None, :]


@triton.jit
def decay_mask(own, before, after, LEVELS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Return L (c, c), or Lᵀ, for one gate per token, (c, 1)."""
    apart = distances(1 << LEVELS)
    mask = tl.where(apart == 0, 1.0, 0.0).to(own.dtype)
    for level in tl.static_range(LEVELS):
        rows = half_decays(own, before, after, 1 << level, not TRANSPOSED)
        columns = half_decays(own, before, after, 1 << level, TRANSPOSED)
        mask = tl.where(apart >> level == 1, rows * tl.trans(columns), mask)
    return mask


@triton.jit
def _decayed_product(r, x, own, before, after, LEVELS: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """Return W (c, c) = Σ_c r_ic x_jc L_ijc, or with Lᵀ, for one gate per channel; all inputs are (c, k)."""
    apart = distances(1 << LEVELS)
    weights = tl.where(apart == 0, tl.sum(r * x, 1)[:, None], 0.0)
    for level in tl.static_range(LEVELS):
        rows = r * half_decays(own, before, after, 1 << level, not TRANSPOSED)
        columns = x * half_decays(own, before, after, 1 << level, TRANSPOSED)
        weights = tl.where(apart >> level == 1, product(rows, tl.trans(columns), PRECISION), weights)
    return weights


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _chunk_states(
    x, w, g, factors, shares, states, sums, chunk_gate, length, heads, chunks,
    x_b: tl.int64, x_l: tl.int64, x_h: tl.int64, x_c, w_b: tl.int64, w_l: tl.int64, w_h: tl.int64, w_c,
    g_b: tl.int64, g_l: tl.int64, g_h: tl.int64, g_c,
    K: tl.constexpr, V: tl.constexpr, LEVELS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SCALAR: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Store states[b, h, n] = Σ_j x_j w_jᵀ (k, v) over chunk n, decayed to its end and start, and sums = Σ_j x_j (k).

    Transposed: with w_j · factors_j for w_j, and x_j · shares_j in the sums.
    """
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0).to(tl.int64)
    tile_v = program % tiles_v
    tile_k = program // tiles_v % tiles_k
    chunk_index = program // (tiles_v * tiles_k)  # of the chunk, in (b, h, n)
    chunk = chunk_index % chunks
    head = chunk_index // chunks % heads
    batch = chunk_index // chunks // heads
    dtype: tl.constexpr = states.dtype.element_ty
    C: tl.constexpr = 1 << LEVELS
    tokens = chunk * C + tl.arange(0, C)
    keys = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    values = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)

    channels = tl.arange(0, 1) if SCALAR else keys
    gates: tl.constexpr = 1 if SCALAR else K
    gates_align: tl.constexpr = 1 if SCALAR else ALIGN
    g = head_of(g, batch, head, g_b, g_h, gates_align)
    own, before, after = load_gates(g, tokens, channels, length, g_l, g_c, gates, gates_align, dtype)
    since, until = decays(own, before, after, C, TRANSPOSED)
    x = load_tokens(head_of(x, batch, head, x_b, x_h, ALIGN), tokens, keys, length, x_l, x_c, K, ALIGN, dtype)
    w = load_tokens(head_of(w, batch, head, w_b, w_h, ALIGN), tokens, values, length, w_l, w_c, V, ALIGN, dtype)
    at = (batch * length + tokens) * heads + head
    if TRANSPOSED:
        w *= tl.load(factors + at, mask=tokens < length, other=0.0)[:, None]

    inner = (keys < K)[:, None] & (values < V)[None, :]
    out = states + chunk_index * 2 * K * V + keys[:, None] * V + values[None, :]
    tl.store(out, product(tl.trans(x * until), w, PRECISION), mask=inner)
    tl.store(out + K * V, product(tl.trans(x * since), w, PRECISION), mask=inner)
    # Every tile of v writes the same values, and with one gate every tile of k the same decay.
    if sums is not None:
        if TRANSPOSED:
            x *= tl.load(shares + at, mask=tokens < length, other=0.0)[:, None]
        tl.store(sums + chunk_index * 2 * K + keys, tl.sum(x * until, 0), mask=keys < K)
        tl.store(sums + (chunk_index * 2 + 1) * K + keys, tl.sum(x * since, 0), mask=keys < K)
    tl.store(chunk_gate + chunk_index * gates + channels, tl.exp(tl.sum(own, 0)), mask=channels < gates)


@triton.jit(do_not_specialize=["chunks"])
def _carry(
    states, chunk_gate, chunks, SIZE: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr, SCALAR: tl.constexpr
):
    """Replace what each chunk adds by the state that enters it, from left and right: (b·h, n, 2, SIZE), in place."""
    tiles: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    gates: tl.constexpr = 1 if SCALAR else SIZE // INNER
    program = tl.program_id(0).to(tl.int64)
    entry = program % tiles * BLOCK + tl.arange(0, BLOCK)
    backward = program // tiles % 2
    sequence = program // tiles // 2
    channel = entry * 0 if SCALAR else entry // INNER
    memory = tl.zeros((BLOCK,), states.dtype.element_ty)
    for step in tl.range(0, chunks, num_stages=3):
        chunk = sequence * chunks + step + backward * (chunks - 1 - 2 * step)
        at = states + (chunk * 2 + backward) * SIZE + entry
        addition = tl.load(at, mask=entry < SIZE, other=0.0)
        decay = tl.load(chunk_gate + chunk * gates + channel, mask=entry < SIZE, other=0.0)
        tl.store(at, memory, mask=entry < SIZE)
        memory = memory * decay + addition


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _mix(
    r, x, w, g, factors, states, sums, y, length, heads, chunks,
    r_b: tl.int64, r_l: tl.int64, r_h: tl.int64, r_c, x_b: tl.int64, x_l: tl.int64, x_h: tl.int64, x_c,
    w_b: tl.int64, w_l: tl.int64, w_h: tl.int64, w_c, g_b: tl.int64, g_l: tl.int64, g_h: tl.int64, g_c,
    y_b: tl.int64, y_l: tl.int64, y_h: tl.int64, y_c,
    EPS: tl.constexpr, SCALE: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, LEVELS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SCALAR: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Store y_i = factor_i Σ_j W_ij w_j for the tokens of a chunk, W_ij = Σ_c r_ic x_jc L_ijc, and the factors.

    The factor is 1 / (Σ_j W_ij + eps) with sums, and the scale without. Transposed: with Lᵀ for L, w_j · factors_j for
    w_j.
    """
    tiles_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0).to(tl.int64)
    values = program % tiles_v * BLOCK_V + tl.arange(0, BLOCK_V)
    chunk_index = program // tiles_v
    chunk = chunk_index % chunks
    head = chunk_index // chunks % heads
    batch = chunk_index // chunks // heads
    dtype: tl.constexpr = states.dtype.element_ty
    C: tl.constexpr = 1 << LEVELS
    tokens = chunk * C + tl.arange(0, C)
    inside = tokens < length

    gates: tl.constexpr = 1 if SCALAR else K
    gates_align: tl.constexpr = 1 if SCALAR else ALIGN
    g = head_of(g, batch, head, g_b, g_h, gates_align)
    r = head_of(r, batch, head, r_b, r_h, ALIGN)
    x = head_of(x, batch, head, x_b, x_h, ALIGN)
    states += chunk_index * 2 * K * V
    mixed = tl.zeros((C, BLOCK_V), dtype)
    weights = tl.zeros((C, C), dtype)
    total = tl.zeros((C,), dtype)
    for first in range(0, K, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)
        channels = tl.arange(0, 1) if SCALAR else keys
        own, before, after = load_gates(g, tokens, channels, length, g_l, g_c, gates, gates_align, dtype)
        since, until = decays(own, before, after, C, not TRANSPOSED)
        rows = load_tokens(r, tokens, keys, length, r_l, r_c, K, ALIGN, dtype)
        columns = load_tokens(x, tokens, keys, length, x_l, x_c, K, ALIGN, dtype)
        at = keys[:, None] * V + values[None, :]
        inner = (keys < K)[:, None] & (values < V)[None, :]
        mixed += product(rows * since, tl.load(states + at, mask=inner, other=0.0), PRECISION)
        mixed += product(rows * until, tl.load(states + K * V + at, mask=inner, other=0.0), PRECISION)
        if sums is not None:
            left = tl.load(sums + chunk_index * 2 * K + keys, mask=keys < K, other=0.0)
            right = tl.load(sums + (chunk_index * 2 + 1) * K + keys, mask=keys < K, other=0.0)
            total += tl.sum(rows * (since * left[None, :] + until * right[None, :]), 1)
        if SCALAR:
            weights += product(rows, tl.trans(columns), PRECISION)
        else:
            weights += _decayed_product(rows, columns, own, before, after, LEVELS, TRANSPOSED, PRECISION)
    if SCALAR:
        own, before, after = load_gates(g, tokens, tl.arange(0, 1), length, g_l, g_c, 1, 1, dtype)
        weights *= decay_mask(own, before, after, LEVELS, TRANSPOSED)

    w = load_tokens(head_of(w, batch, head, w_b, w_h, ALIGN), tokens, values, length, w_l, w_c, V, ALIGN, dtype)
    at = factors + (batch * length + tokens) * heads + head
    if TRANSPOSED:
        w *= tl.load(at, mask=inside, other=0.0)[:, None]
    mixed += product(weights, w, PRECISION)
    if not TRANSPOSED:
        factor = tl.zeros((C,), dtype) + SCALE
        if sums is not None:
            factor = 1.0 / (total + tl.sum(weights, 1) + EPS)
        mixed *= factor[:, None]
        tl.store(at, factor, mask=inside)  # every tile of v stores the same values
    out = head_of(y, batch, head, y_b, y_h, ALIGN) + (tokens * y_l)[:, None] + values[None, :] * y_c
    tl.store(out, mixed.to(y.dtype.element_ty), mask=inside[:, None] & (values < V)[None, :])


def chunk_states(
    x: Tensor, w: Tensor, normalize: bool, factors: Tensor | None = None, shares: Tensor | None = None,
    *, g: Tensor, dtype: torch.dtype, PRECISION: str,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Return the states that enter every chunk from either side, (b, h, n, 2, k, v) and (b, h, n, 2, k), and its decay.

    They are sums over keys x and values w; with factors and shares, over queries and gradients (`TRANSPOSED`).
    """
    (batch, _, heads, key) = x.shape
    value = w.shape[-1]
    sizes = launch_sizes(x, w, g, dtype, x, w)
    chunks = sizes["chunks"]
    largest = 64 if PRECISION == "tf32" else 32
    block_k = tile(key, largest)
    block_v = tile(value, largest)
    states = x.new_empty(batch, heads, chunks, 2, key, value, dtype=dtype)
    sums = x.new_empty(batch, heads, chunks, 2, key, dtype=dtype) if normalize else None
    chunk_gate = x.new_empty(batch, heads, chunks, g.shape[-1], dtype=dtype)
    _chunk_states[(batch * heads * chunks * triton.cdiv(key, block_k) * triton.cdiv(value, block_v),)](
        x, w, g, factors, shares, states, sums, chunk_gate, **strides(x=x, w=w, g=g), **sizes, BLOCK_K=block_k,
        BLOCK_V=block_v, TRANSPOSED=factors is not None, PRECISION=PRECISION,
    )  # fmt: skip
    for carried, size in ((states, key * value), (sums, key)):
        if carried is not None:
            _carry[(batch * heads * 2 * triton.cdiv(size, CARRIED),)](
                carried,
                chunk_gate,
                chunks,
                SIZE=size,
                INNER=size // key,
                BLOCK=CARRIED,
                SCALAR=sizes["SCALAR"],
                num_warps=2,
            )
    return states, sums, chunk_gate


def mix(
    r: Tensor, x: Tensor, w: Tensor, states: Tensor, sums: Tensor | None, y: Tensor, factors: Tensor | None = None,
    *, g: Tensor, dtype: torch.dtype, PRECISION: str, EPS: float = 0.0, SCALE: float = 1.0,
) -> Tensor:  # fmt: skip
    """Write y (b, l, h, v) = factor · W w and return the factors (b, l, h); with factors given, y = Wᵀ (factor · w)."""
    (batch, length, heads, key) = r.shape
    value = w.shape[-1]
    sizes = launch_sizes(r, w, g, dtype, r, x, w, y)
    block_v = tile(value, 64 if PRECISION == "tf32" else 32)
    out = r.new_empty(batch, length, heads, dtype=dtype) if factors is None else factors
    _mix[(batch * heads * sizes["chunks"] * triton.cdiv(value, block_v),)](
        r, x, w, g, out, states, sums, y, **strides(r=r, x=x, w=w, g=g, y=y), **sizes, EPS=EPS, SCALE=SCALE,
        BLOCK_K=tile(key, 32), BLOCK_V=block_v, TRANSPOSED=factors is not None, PRECISION=PRECISION,
    )  # fmt: skip
    return out


def launch_sizes(x: Tensor, w: Tensor, g: Tensor, dtype: torch.dtype, *strided: Tensor) -> dict[str, Any]:
    """Return the sizes that every kernel over chunks gets, and the alignment of the strides."""
    scalar = g.shape[-1] == 1
    levels = LEVELS if scalar and dtype == torch.float32 else FEW_LEVELS
    counts = {"length": x.shape[1], "heads": x.shape[2], "chunks": triton.cdiv(x.shape[1], 1 << levels)}
    align = alignment(*strided) if scalar else alignment(g, *strided)
    return {**counts, "K": x.shape[-1], "V": w.shape[-1], "LEVELS": levels, "SCALAR": scalar, "ALIGN": align}


def strides(**tensors: Tensor) -> dict[str, int]:
    """Return the strides of (b, l, h, ·) tensors by the names of the kernels' arguments."""
    return {f"{name}_{axis}": t.stride(i) for name, t in tensors.items() for i, axis in enumerate("blhc")}
