"""The first reference: build W (b, h, l, l) and multiply.

With A_t = (I − β_t k_t k_tᵀ) Diag(a_t), W_ij = q_iᵀ A_i … A_{j+1} k_j β_j for j ≤ i. There is no state: every query
moves through the tokens, from its own to the first, and reads each one it meets. All queries at once: l steps of
O(l·k).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixers.operators.backend import register_backend
from mixers.operators.delta.backend import DeltaRuleBackend


@register_backend("dense")
class DenseDeltaRule(DeltaRuleBackend):
    """The l × l matrix, applied to the values."""

    def causal(
        self, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what tokens read of tokens 0 … i and the memory, (b, l, h, v), and the final memory (b, h, k, v)."""
        b, length, h, key = q.shape
        # The final memory is what unit vectors would read after the last token.
        units = torch.eye(key, dtype=q.dtype, device=q.device).expand(b, h, key, key)
        matrix, remaining = _lower_triangle(torch.cat([q.transpose(1, 2), units], dim=2), k, beta, log_decay)
        read = matrix @ v.transpose(1, 2) + remaining @ memory
        return read[:, :, :length].transpose(1, 2), read[:, :, length:]

    def bidirectional(self, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor) -> Tensor:
        """Return what tokens read in both directions, (b, l, h, v)."""
        return torch.einsum("bhij,bjhv->bihv", mixing_matrix(q, k, beta, log_decay, "bidirectional"), v)

    def noncausal(self, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor) -> Tensor:
        """Return what tokens read after one step on all tokens at once, (b, l, h, v)."""
        return torch.einsum("bhij,bjhv->bihv", mixing_matrix(q, k, beta, log_decay, "noncausal"), v)


def mixing_matrix(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, causality: str) -> Tensor:
    """Return W, (b, h, l, l), by its definition; q and k (b, l, h, k), beta (b, l, h), log_decay (b, l, h, 1 or k)."""
    if causality == "noncausal":
        return _one_step_matrix(q, k, beta, log_decay)
    lower, _ = _lower_triangle(q.transpose(1, 2), k, beta, log_decay)
    if causality == "causal":
        return lower
    return lower + _upper_triangle(q.transpose(1, 2), k, beta, log_decay)


def _lower_triangle(rows: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Return W_ij for j ≤ i, (b, h, r, l), and row_i A_i … A_0, (b, h, r, k), for rows (b, h, r ≥ l, k).

    Rows from l on stand after the last token.
    """
    columns = []
    for j in reversed(range(k.shape[1])):
        column, passed = _pass_token(rows[:, :, j:], k[:, j], beta[:, j], log_decay[:, j])
        columns.append(F.pad(column, (j, 0)))
        rows = torch.cat([rows[:, :, :j], passed], dim=2)
    return torch.stack(columns[::-1], dim=-1), rows


def _upper_triangle(rows: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    """Return W_ij = q_iᵀ A_i … A_{j−1} k_j β_j for j > i, (b, h, l, l); a query does not read its own token."""
    columns = []
    length = k.shape[1]
    for j in range(length):
        column, passed = _pass_token(rows[:, :, : j + 1], k[:, j], beta[:, j], log_decay[:, j])
        columns.append(F.pad(column[..., :j], (0, length - j)))
        rows = torch.cat([passed, rows[:, :, j + 1 :]], dim=2)
    return torch.stack(columns, dim=-1)


def _pass_token(rows: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows·k β, (b, h, r), and rows·A, (b, h, r, k), for one token.

    k is (b, h, k), beta (b, h) and log_decay (b, h, 1 or k).
    """
    column = (rows @ k[..., None])[..., 0] * beta[..., None]
    return column, log_decay.exp()[..., None, :] * (rows - column[..., None] * k[..., None, :])


def _one_step_matrix(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    """Return W_ij = (2 q_i·w_j − Σ_t (q_i·w_t) (k_t·w_j)) with w_j = a_j ⊙ k_j β_j / l, (b, h, l, l)."""
    write_keys = beta[..., None] * log_decay.exp() * k / k.shape[1]
    scores = torch.einsum("bihk,bjhk->bhij", q, write_keys)
    overlaps = torch.einsum("bihk,bjhk->bhij", k, write_keys)
    return 2 * scores - scores @ overlaps
