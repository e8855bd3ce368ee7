"""What ours is compared with: formulas as others publish them, and others' blocks. Imported when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], object]


def published_linfusion(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-4) -> Tensor:
    """LinFusion's formula in eager torch, as its published code orders the steps; (b, l, h, ·), as views of
    projections.

    q, k <- elu + 1;  z = q · mean k + eps;  y = q (l^-1/2 kᵀ · l^-1/2 v) / z.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    z = q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + eps
    root = k.shape[-2] ** -0.5
    return (q @ ((k.transpose(-2, -1) * root) @ (v * root)) / z).transpose(1, 2)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention by torch (flash where the device has it); (b, l, h, ·)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def fla_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    """fla's causal kernels, not normalized: simple_gla, or gla with a gate a channel."""
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    if log_decay is not None and log_decay.ndim == 4:
        return chunk_gla(q, k, v, log_decay, scale=1.0)[0]
    return chunk_simple_gla(q, k, v, log_decay, scale=1.0)[0]


def transformers_mamba(dim: int) -> torch.nn.Module:
    """transformers' Mamba block at its defaults; on a CPU its own path in torch."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    return MambaMixer(MambaConfig(hidden_size=dim, state_size=16, expand=2, conv_kernel=4), layer_idx=0)


def transformers_mamba2(dim: int) -> torch.nn.Module:
    """transformers' Mamba-2 block at its defaults; on a CPU its own path in torch."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    heads = 2 * dim // 64
    return Mamba2Mixer(
        Mamba2Config(hidden_size=dim, num_heads=heads, head_dim=64, state_size=128, n_groups=1, chunk_size=256),
        layer_idx=0,
    )


def forward(function: Callable[..., Any], *tensors: Any) -> Call:
    """A call without gradients."""

    def run() -> object:
        with torch.no_grad():
            return function(*tensors)

    return run


def with_backward(function: Callable[..., Any], *tensors: Any) -> Call:
    """A call and the gradients of its floating tensors."""
    leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in tensors]
    wanted = [t for t in leaves if isinstance(t, Tensor)]
    dy: list[Tensor] = []

    def run() -> object:
        y = function(*leaves)
        if not dy:
            dy.append(torch.randn_like(y))
        return torch.autograd.grad(y, wanted, dy[0], allow_unused=True)

    return run
