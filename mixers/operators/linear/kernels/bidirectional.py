"""Bidirectional decayed linear attention by Triton kernels, as an operator of torch with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixers.operators.linear.kernels.bidirectional_backward import gradients
from mixers.operators.linear.kernels.chunks import chunk_states, mix
from mixers.operators.linear.kernels.launch import precisions
from mixers.precision import accumulation_dtype


def bidirectional_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, normalize: bool, eps: float, scale: float
) -> Tensor:
    """Linear attention with decay in both directions (SSD, 2405.21060, or GLA, 2312.06635).

    W_ij = Σ_c q_ic k_jc L_ijc with L_ij = ∏_{t=j+1..i} a_t for j ≤ i, ∏_{t=i..j−1} a_t for j > i, a = exp(log_decay);
    y = W v / (row sums of W + eps), or scale · W v.

    Args:
        q: (b, l, h, k), features already, of any floating dtype and strides.
        k: likewise.
        v: (b, l, h, v), likewise.
        log_decay: ≤ 0, (b, l, h, 1) or (b, l, h, k); −inf is a gate of 0.
        normalize: as in `linear_attention`.
        eps: as in `linear_attention`.
        scale: as in `linear_attention`.

    Returns:
        (b, l, h, v) in v's dtype. Sums are float32, float64 for float64 inputs; products of half-precision inputs are
        as `launch.precisions` says. First derivatives only. Deterministic.
        Cost: O(l·(c·(k + v) + k·v)) time, with one gate per channel O(l·(c·(k·log c + v) + k·v)), for chunks of c = 64
        tokens, or 32 with one gate per channel or in float64. Memory besides inputs and result: 2·l·k·v / c numbers per
        head. Only the inputs are saved for the backward pass. It computes the states and, if `normalize`, the result
        again: four or five passes over the tokens, with twice that memory and b·l·h·v numbers.
    """
    return _attention(q, k, v, log_decay, normalize, eps, scale)


@torch.library.custom_op("mixers::bidirectional_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, normalize: bool, eps: float, scale: float) -> Tensor:
    common: dict[str, Any] = {"g": log_decay, "dtype": accumulation_dtype(q, k, v), "PRECISION": precisions(q, k, v)[0]}
    y = v.new_empty(v.shape)
    with torch.cuda.device_of(q):
        states, sums, _ = chunk_states(k, v, normalize, **common)
        mix(q, k, v, states, sums, y, EPS=eps, SCALE=scale, **common)
    return y


@torch.library.custom_op("mixers::bidirectional_attention_backward", mutates_args=())
def _gradient(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, normalize: bool, eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(q):
        return gradients(dy, q, k, v, log_decay, normalize, eps, scale)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(v.shape)


@_gradient.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (q, k, v, log_decay))


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _differentiate(ctx, dy: Tensor):  # type: ignore[no-untyped-def]
    return *_gradient(dy, *ctx.saved_tensors, *ctx.settings), None, None, None


_attention.register_autograd(_differentiate, setup_context=_keep)
