"""The first truth: build W (b, h, l, l) and multiply.

With A_t = a_t (I − β_t k_t k_tᵀ), W_ij = q_iᵀ A_i … A_{j+1} k_j β_j for j ≤ i. Queries are taken through the tokens,
from their own on, and read each as they meet it; there is no state. All queries at once: l steps of O(l·k).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def weights(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, causality: str) -> Tensor:
    """W, (b, h, l, l), by its definition; q, k: (b, l, h, k), beta, log_decay: (b, l, h)."""
    lower, _ = _lower(q.transpose(1, 2), k, beta, log_decay)
    if causality == "causal":
        return lower
    return lower + _upper(q.transpose(1, 2), k, beta, log_decay)


def causal(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """What tokens read of tokens 0 … i and of the memory, (b, l, h, v), and the memory after the last, (b, h, k, v)."""
    b, length, h, key = q.shape
    # The memory after the last token is what unit vectors would read after it.
    units = torch.eye(key, dtype=q.dtype, device=q.device).expand(b, h, key, key)
    matrix, left = _lower(torch.cat([q.transpose(1, 2), units], dim=2), k, beta, log_decay)
    read = matrix @ v.transpose(1, 2) + left @ memory
    return read[:, :, :length].transpose(1, 2), read[:, :, length:]


def bidirectional(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor) -> Tensor:
    """What tokens read in both directions, (b, l, h, v)."""
    return torch.einsum("bhij,bjhv->bihv", weights(q, k, beta, log_decay, "bidirectional"), v)


def _lower(rows: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """W_ij for j ≤ i, (b, h, r, l), and row_i A_i … A_0, (b, h, r, k), from rows (b, h, r ≥ l, k).

    Rows from l on belong after the last token.
    """
    columns = []
    for j in reversed(range(k.shape[1])):
        column, through = _meet(rows[:, :, j:], k[:, j], beta[:, j], log_decay[:, j])
        columns.append(F.pad(column, (j, 0)))
        rows = torch.cat([rows[:, :, :j], through], dim=2)
    return torch.stack(columns[::-1], dim=-1), rows


def _upper(rows: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    """W_ij = q_iᵀ A_i … A_{j−1} k_j β_j for j > i, (b, h, l, l): a query goes through its own token, unread."""
    columns = []
    length = k.shape[1]
    for j in range(length):
        column, through = _meet(rows[:, :, : j + 1], k[:, j], beta[:, j], log_decay[:, j])
        columns.append(F.pad(column[..., :j], (0, length - j)))
        rows = torch.cat([through, rows[:, :, j + 1 :]], dim=2)
    return torch.stack(columns, dim=-1)


def _meet(rows: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """rows·k β, (b, h, r), and rows·A, (b, h, r, k), of one token: k (b, h, k), beta, log_decay (b, h)."""
    column = (rows @ k[..., None])[..., 0] * beta[..., None]
    return column, log_decay.exp()[..., None, None] * (rows - column[..., None] * k[..., None, :])
