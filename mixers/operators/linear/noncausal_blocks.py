"""Passes without an order on a CPU: one block of tokens after another, from the feature map on.

With f = φ(q), g = φ(k) ⊙ a for gates a (1 without gates), and means over all tokens,

    M = mean_j g_j v_jᵀ,   z = mean_j g_j,   y_i = w_i f_i M   with w_i = 1 / (f_i·z + eps), unnormalized scale · l.

The gradients, with e = w dy and c_i = −w_i f_i·(M e_i), unnormalized 0, are

    df_i = M e_i + c_i z,   dM = Σ_i f_i e_iᵀ,   dz = Σ_i c_i f_i,   dg_j = (dM v_j + dz) / l,   dv_j = dMᵀ g_j / l.

Results are allocated before the first block. Features never exist as a whole: each pass maps its own blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from mixers.feature_maps import FEATURE_MAPS, FeatureMap
from mixers.operators import blockwise
from mixers.operators.differentiation import differentiable_gradients
from mixers.operators.linear.backend import LinearAttentionCall
from mixers.precision import accumulation_dtype, no_autocast

BatchAndTokens = tuple[slice, slice]


@dataclass(frozen=True)
class _Settings:
    """The switches of a call; `factor` is that of the unnormalized means."""

    feature_map: FeatureMap
    normalize: bool
    eps: float
    factor: float


def attend(call: LinearAttentionCall) -> Tensor:
    """Return the result of a call without an order, (b, l, h, v) in v's dtype. O(l·k·v) time.

    Besides q, k, v and the result it needs memory for O(k·v) sums and the features of a block; the backward pass
    likewise, besides the gradients.
    """
    call = call.with_all_heads()
    settings = _Settings(FEATURE_MAPS[call.feature_map], call.normalize, call.eps, call.scale * call.k.shape[1])
    y: Tensor = _NoncausalAttention.apply(call.q, call.k, call.v, call.log_decay, settings)
    return y


class _NoncausalAttention(torch.autograd.Function):
    """The formulas above: keys before queries, and in the backward pass queries before keys."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, settings):  # type: ignore[no-untyped-def]
        dtype = accumulation_dtype(q, k, v)
        blocks = _blocks(k, v)
        memory = k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1], dtype=dtype)
        key_mean = k.new_zeros(k.shape[0], k.shape[2], 1, k.shape[3], dtype=dtype)
        for block in blocks:
            keys = settings.feature_map.apply(_heads_first(k, block, dtype))
            if log_decay is not None:
                keys = keys * _heads_first(log_decay, block, dtype).exp()
            memory[block[0]] += keys.mT @ _heads_first(v, block, dtype)
            key_mean[block[0]] += keys.sum(-2, keepdim=True)
        memory = memory / k.shape[1]
        key_mean = key_mean / k.shape[1]
        y = torch.empty_like(v)
        for block in blocks:
            queries = settings.feature_map.apply(_heads_first(q, block, dtype))
            factors = _row_factors(queries, key_mean[block[0]], settings)
            torch.mul(queries @ memory[block[0]], factors, out=_heads_first(y, block))
        ctx.save_for_backward(q, k, v, log_decay, memory, key_mean)
        ctx.settings = settings
        ctx.blocks = blocks
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        q, k, v, log_decay, memory, key_mean = ctx.saved_tensors
        with no_autocast(q):
            if torch.is_grad_enabled():  # create_graph=True

                def attend(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
                    return _attend_plainly(q, k, v, log_decay, ctx.settings)

                gradients = differentiable_gradients(attend, (q, k, v, log_decay), (dy,), ctx.needs_input_grad[:4])
                return *gradients, None
            dq, d_memory, d_key_mean = _query_gradients(ctx, q, dy, memory, key_mean)
            dk, dv, d_log_decay = _key_gradients(ctx, k, v, log_decay, d_memory / k.shape[1], d_key_mean / k.shape[1])
        return dq, dk, dv, d_log_decay, None


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, settings: _Settings) -> Tensor:
    """Return the same result by operations that torch can differentiate any number of times."""
    dtype = accumulation_dtype(q, k, v)
    queries = settings.feature_map.apply(q.to(dtype))
    keys = settings.feature_map.apply(k.to(dtype))
    if log_decay is not None:
        keys = keys * log_decay.to(dtype).exp()
    keys = keys / k.shape[1]
    y = torch.einsum("blhk,bhkv->blhv", queries, torch.einsum("blhk,blhv->bhkv", keys, v.to(dtype)))
    if settings.normalize:
        y = y / (torch.einsum("blhk,bhk->blh", queries, keys.sum(1)) + settings.eps)[..., None]
    else:
        y = y * settings.factor
    return y.to(v.dtype)


def _query_gradients(ctx, q, dy, memory, key_mean):  # type: ignore[no-untyped-def]
    """From dy to the gradients of q, M and z."""
    settings = ctx.settings
    dq = torch.empty_like(q)
    d_memory = torch.zeros_like(memory)
    d_key_mean = torch.zeros_like(key_mean)
    for block in ctx.blocks:
        queries = settings.feature_map.apply(_heads_first(q, block, memory.dtype))
        factors = _row_factors(queries, key_mean[block[0]], settings)
        errors = _heads_first(dy, block, memory.dtype) * factors
        gradient = errors @ memory[block[0]].mT
        d_memory[block[0]] += queries.mT @ errors
        if settings.normalize:
            shares = (queries * gradient).sum(-1, keepdim=True) * -factors
            d_key_mean[block[0]] += (queries * shares).sum(-2, keepdim=True)
            gradient.addcmul_(shares, key_mean[block[0]])
        torch.mul(gradient, settings.feature_map.slope(queries), out=_heads_first(dq, block))
    return dq, d_memory, d_key_mean


def _key_gradients(ctx, k, v, log_decay, d_memory, d_key_mean):  # type: ignore[no-untyped-def]
    """From the gradients of the means to those of k, v and the log decay."""
    feature_map = ctx.settings.feature_map
    dk = torch.empty_like(k)
    dv = torch.empty_like(v)
    d_log_decay = None if log_decay is None else torch.empty_like(log_decay)
    for block in ctx.blocks:
        keys = feature_map.apply(_heads_first(k, block, d_memory.dtype))
        slope = feature_map.slope(keys)
        gradient = (_heads_first(v, block, d_memory.dtype) @ d_memory[block[0]].mT).add_(d_key_mean[block[0]])
        if d_log_decay is not None:
            gates = _heads_first(log_decay, block, d_memory.dtype).exp()
            keys = keys * gates
            slope = slope * gates
            _heads_first(d_log_decay, block).copy_((gradient * keys).sum_to_size(gates.shape))
        torch.mul(gradient, slope, out=_heads_first(dk, block))
        _heads_first(dv, block).copy_(keys @ d_memory[block[0]])
    return dk, dv, d_log_decay


def _row_factors(queries: Tensor, key_mean: Tensor, settings: _Settings) -> Tensor:
    """Return w, (b, h, n, 1), or one element."""
    if not settings.normalize:
        return queries.new_tensor(settings.factor)
    return ((queries * key_mean).sum(-1, keepdim=True) + settings.eps).reciprocal_()


def _heads_first(x: Tensor, block: BatchAndTokens, dtype: torch.dtype | None = None) -> Tensor:
    """Return a block of (b, l, h, ·) as (b, h, n, ·): for one image a view that matrix products take as it is."""
    return x[block].transpose(1, 2).to(dtype or x.dtype)


def _blocks(k: Tensor, v: Tensor) -> list[BatchAndTokens]:
    """Return the images and tokens of each block: equal parts of one image, or several whole images."""
    images, length = k.shape[:2]
    most = max(1, blockwise.BLOCK_ELEMENTS // max(1, k.shape[2] * max(k.shape[3], v.shape[3])))
    tokens = ceil(length / ceil(length / most))
    images_per_block = max(1, most // length)
    return [
        (slice(image, image + images_per_block), slice(start, start + tokens))
        for image in range(0, images, images_per_block)
        for start in range(0, length, tokens)
    ]
