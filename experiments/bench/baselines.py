"""Implementations to compare with: published formulas and other libraries, which are imported when they are used."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def published_linfusion(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-4) -> Tensor:
    """Compute LinFusion's attention in eager PyTorch, with the operations in the order of its published code.

    q, k ← elu + 1;  z = q · mean(k) + eps;  y = q (l^-1/2 kᵀ · l^-1/2 v) / z.

    Args:
        q: queries (b, l, h, k), like all inputs a view of a projection.
        k: keys (b, l, h, k).
        v: values (b, l, h, v).
        eps: added to the denominator.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    q = F.elu(q) + 1
    k = F.elu(k) + 1
    z = q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + eps
    scale = k.shape[-2] ** -0.5
    return (q @ ((k.transpose(-2, -1) * scale) @ (v * scale)) / z).transpose(1, 2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax attention by PyTorch's fused kernel (flash where the device has it); all (b, l, h, ·)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def fla_causal(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    """Run fla's own causal kernel, unnormalized: GLA for one decay per key channel, simple GLA otherwise.

    Args:
        q: queries (b, l, h, k).
        k: keys (b, l, h, k).
        v: values (b, l, h, v).
        log_decay: (b, l, h) or (b, l, h, k); None: no decay.
    """
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    if log_decay is not None and log_decay.ndim == 4:
        return chunk_gla(q, k, v, log_decay, scale=1.0)[0]
    return chunk_simple_gla(q, k, v, log_decay, scale=1.0)[0]


def transformers_mamba(dim: int) -> torch.nn.Module:
    """Build transformers' Mamba block at its defaults; on a CPU it runs its PyTorch path."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    return MambaMixer(MambaConfig(hidden_size=dim, state_size=16, expand=2, conv_kernel=4), layer_idx=0)


def transformers_mamba2(dim: int) -> torch.nn.Module:
    """Build transformers' Mamba-2 block at its defaults; on a CPU it runs its PyTorch path."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=dim, num_heads=2 * dim // 64, head_dim=64, state_size=128, n_groups=1, chunk_size=256
    )
    return Mamba2Mixer(config, layer_idx=0)
