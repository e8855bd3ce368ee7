"""Where the order plays no part, on a CPU: block after block of tokens, each from the feature map on in the cache.

With f = φ(q), g = φ(k) ⊙ a for gates a, 1 where there are none, and means over all tokens,

    M = mean_j g_j v_jᵀ,   z = mean_j g_j,   y_i = w_i f_i M   with w_i = 1 / (f_i·z + eps), unnormalized scale · l,

and the gradients, with e = w dy and c_i = −w_i f_i·(M e_i), unnormalized 0, are

    df_i = M e_i + c_i z,   dM = Σ_i f_i e_iᵀ,   dz = Σ_i c_i f_i,   dg_j = (dM v_j + dz) / l,   dv_j = dMᵀ g_j / l.

Results have their place before the first block. Features are nowhere as a whole: each pass maps its own blocks.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from mixers.feature_maps import FEATURE_MAPS
from mixers.operators.linear import chunked
from mixers.operators.linear.call import Backend, Call
from mixers.precision import accumulation_dtype, no_autocast

BLOCK_ELEMENTS = 1 << 18  # of the features of a block: they stay in the cache
Place = tuple[slice, slice]


def by_blocks(call: Call) -> bool:
    """Whether blocks pay: not on a GPU, which wants all tokens at once, nor for a compiler, which would unroll them."""
    return call.q.device.type == "cpu" and not torch.compiler.is_compiling()


def unordered(call: Call) -> tuple[Tensor, None]:
    """The result of a `noncausal` call, or a `bidirectional` one without decay. First derivatives only.

    (b, l, h, v) in v's dtype. O(l·k·v) time. Memory besides q, k, v and the result: O(k·v) and the features of a block;
    backward too, besides the gradients. On a GPU and in a compiled graph: `chunked`, all tokens at once.
    """
    if not by_blocks(call):
        return Backend(chunked).attend(call)[0], None
    factor = call.scale * call.k.shape[1]
    feature_map = FEATURE_MAPS[call.feature_map]
    y: Tensor = _Unordered.apply(call.q, call.k, call.v, call.log_decay, feature_map, call.normalize, call.eps, factor)
    return y, None


class _Unordered(torch.autograd.Function):
    """The formulas above: keys before queries, and in backward queries before keys."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, feature_map, normalize, eps, factor):  # type: ignore[no-untyped-def]
        dtype, places = accumulation_dtype(q, k, v), _blocks(k, v)
        memory = k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1], dtype=dtype)
        weight = k.new_zeros(k.shape[0], k.shape[2], 1, k.shape[3], dtype=dtype)
        for place in places:
            keys = feature_map.apply(_heads(k, place, dtype))
            if log_decay is not None:
                keys = keys * _heads(log_decay, place, dtype).exp()
            memory[place[0]] += keys.mT @ _heads(v, place, dtype)
            weight[place[0]] += keys.sum(-2, keepdim=True)
        memory, weight = memory / k.shape[1], weight / k.shape[1]
        y = torch.empty_like(v)
        for place in places:
            queries = feature_map.apply(_heads(q, place, dtype))
            rows = _row_factors(queries, weight[place[0]], normalize, eps, factor)
            torch.mul(queries @ memory[place[0]], rows, out=_heads(y, place))
        ctx.save_for_backward(q, k, v, log_decay, memory, weight)
        ctx.settings, ctx.places = (feature_map, normalize, eps, factor), places
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        q, k, v, log_decay, memory, weight = ctx.saved_tensors
        with no_autocast(q):
            dq, d_memory, d_weight = _through_queries(ctx, q, dy, memory, weight)
            gradients = _through_keys(ctx, k, v, log_decay, d_memory / k.shape[1], d_weight / k.shape[1])
        return dq, *gradients, None, None, None, None


def _through_queries(ctx, q, dy, memory, weight):  # type: ignore[no-untyped-def]
    """From dy to the gradients of q, M and z."""
    feature_map, normalize, eps, factor = ctx.settings
    dq, d_memory, d_weight = torch.empty_like(q), torch.zeros_like(memory), torch.zeros_like(weight)
    for place in ctx.places:
        queries = feature_map.apply(_heads(q, place, memory.dtype))
        rows = _row_factors(queries, weight[place[0]], normalize, eps, factor)
        errors = _heads(dy, place, memory.dtype) * rows
        gradient = errors @ memory[place[0]].mT
        d_memory[place[0]] += queries.mT @ errors
        if normalize:
            shares = (queries * gradient).sum(-1, keepdim=True) * -rows
            d_weight[place[0]] += (queries * shares).sum(-2, keepdim=True)
            gradient.addcmul_(shares, weight[place[0]])
        torch.mul(gradient, feature_map.slope(queries), out=_heads(dq, place))
    return dq, d_memory, d_weight


def _through_keys(ctx, k, v, log_decay, d_memory, d_weight):  # type: ignore[no-untyped-def]
    """From the gradients of the sums to those of k, v and the log decay."""
    feature_map = ctx.settings[0]
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    d_log = None if log_decay is None else torch.empty_like(log_decay)
    for place in ctx.places:
        keys = feature_map.apply(_heads(k, place, d_memory.dtype))
        slope = feature_map.slope(keys)
        gradient = (_heads(v, place, d_memory.dtype) @ d_memory[place[0]].mT).add_(d_weight[place[0]])
        if d_log is not None:
            gates = _heads(log_decay, place, d_memory.dtype).exp()
            keys, slope = keys * gates, slope * gates
            _heads(d_log, place).copy_((gradient * keys).sum_to_size(gates.shape))
        torch.mul(gradient, slope, out=_heads(dk, place))
        _heads(dv, place).copy_(keys @ d_memory[place[0]])
    return dk, dv, d_log


def _row_factors(queries: Tensor, weight: Tensor, normalize: bool, eps: float, factor: float) -> Tensor:
    """w, (b, h, n, 1), or of one element."""
    return ((queries * weight).sum(-1, keepdim=True) + eps).reciprocal_() if normalize else queries.new_tensor(factor)


def _heads(x: Tensor, place: Place, dtype: torch.dtype | None = None) -> Tensor:
    """A block of (b, l, h, ·) as (b, h, n, ·): of one image a view that matrix products take as it is."""
    return x[place].transpose(1, 2).to(dtype or x.dtype)


def _blocks(k: Tensor, v: Tensor) -> list[Place]:
    """Images and tokens of each block: equal parts of one image, or several whole images."""
    images, length = k.shape[:2]
    most = max(1, BLOCK_ELEMENTS // max(1, k.shape[2] * max(k.shape[3], v.shape[3])))
    tokens, at_once = ceil(length / ceil(length / most)), max(1, most // length)
    return [
        (slice(image, image + at_once), slice(start, start + tokens))
        for image in range(0, images, at_once)
        for start in range(0, length, tokens)
    ]
