"""Random inputs of the operators, in the layout (batch, tokens, heads, width)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from experiments.bench.config import BenchmarkConfig

InputFactory = Callable[[BenchmarkConfig, int, int, int], tuple[Any, ...]]
"""Takes (config, length, heads, width) and returns an operator's positional arguments."""

STATES = 16
"""Number of states per channel of a selective scan, Mamba's default."""


def attention_inputs(config: BenchmarkConfig, length: int, heads: int, width: int) -> tuple[Tensor, ...]:
    """Return q, k, v (b, l, h, k) as projections produce them: views of contiguous (b, l, h · k)."""
    return tuple(config.randn(config.batch, length, heads * width).unflatten(-1, (heads, -1)) for _ in range(3))


def linear_inputs(decay: str, config: BenchmarkConfig, length: int, heads: int, width: int) -> tuple[Any, ...]:
    """Return q, k, v and the log decay of linear attention.

    Args:
        decay: "none", "scalar" (b, l, h) or "vector" (b, l, h, k).
        config: device, dtype and batch size.
        length: number of tokens.
        heads: number of heads.
        width: of each head.
    """
    shapes = {"scalar": (config.batch, length, heads), "vector": (config.batch, length, heads, width)}
    log_decay = -config.randn(*shapes[decay]).float().abs() if decay in shapes else None
    return (*attention_inputs(config, length, heads, width), log_decay)


def scan_inputs(config: BenchmarkConfig, length: int, heads: int, width: int) -> tuple[Tensor, ...]:
    """Return u, dt, A, B, C of a selective scan with `STATES` states."""
    tokens = (config.batch, length, heads)
    A = -config.randn(heads, width, STATES).float().exp()
    return (
        config.randn(*tokens, width),
        config.randn(*tokens, width).sigmoid(),
        A,
        config.randn(*tokens, STATES),
        config.randn(*tokens, STATES),
    )


def delta_inputs(decay: str, config: BenchmarkConfig, length: int, heads: int, width: int) -> tuple[Tensor, ...]:
    """Return q, k, v, beta and the log decay of the gated delta rule, scalar or vector; keys have unit norm."""
    q, k, v = attention_inputs(config, length, heads, width)
    beta = config.randn(*q.shape[:3]).sigmoid()
    log_decay = -config.randn(*(q.shape if decay == "vector" else q.shape[:3])).abs()
    return q, F.normalize(k, dim=-1), v, beta, log_decay
