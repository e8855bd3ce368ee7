"""The selective scan by mamba_ssm (state-spaces/mamba): its CUDA kernel, which recent releases build
on request only."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.operators.bridge import refuses_size
from mixers.operators.choice import Problem

NARROW = True
LARGEST_STATE = 256


def refuses(problem: Problem) -> str | None:
    """Why mamba_ssm cannot compute this, or None."""
    u, A = problem.tensors["u"], problem.tensors["A"]
    assert u is not None and A is not None
    if problem.causality == "noncausal":
        return "there is no order to scan over; use chunked"
    if problem.initial_state is not None:
        return "it starts from an empty state only"
    if A.shape[-1] > LARGEST_STATE:
        return f"states of {A.shape[-1]} are larger than its {LARGEST_STATE}"
    if u.dtype == torch.float64:
        return "it has no float64"
    return _not_built() or refuses_size(problem)


def causal(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Decayed sums over tokens 0 … i, (b, l, h, v), and the memory after the last; `memory` is that of no tokens."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    channels = [t.permute(0, 2, 3, 1).flatten(1, 2).contiguous() for t in (u, dt)]  # (b, h·v, l)
    states = [t.permute(0, 2, 3, 1).contiguous() for t in (B, C)]  # (b, h, n, l): a group a head
    rates = A.flatten(0, 1).float().contiguous()
    y, memory = selective_scan_fn(channels[0], channels[1].to(u.dtype), rates, *states, return_last_state=True)
    return y.unflatten(1, A.shape[:2]).permute(0, 3, 1, 2), memory.unflatten(1, A.shape[:2])


def bidirectional(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
    """Sums over all tokens, decayed in both directions, (b, l, h, v).

    Both passes see the token itself, and what it adds to itself is taken off once, in float32.
    """
    memory = u.new_zeros(u.shape[0], *A.shape)
    ahead = causal(dt, A, B, C, u, memory)[0]
    back = causal(*(dt.flip(1), A, B.flip(1), C.flip(1), u.flip(1)), memory)[0].flip(1)
    own = (C.float() * B.float()).sum(-1, keepdim=True) * dt.float() * u.float()
    return (ahead.float() + back.float() - own).to(u.dtype)


def _not_built() -> str | None:
    try:
        import selective_scan_cuda  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        return "this build of mamba_ssm has no selective_scan_cuda; install it with MAMBA_FORCE_BUILD=TRUE"
    return None
