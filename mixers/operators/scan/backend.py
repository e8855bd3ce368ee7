"""A call of `selective_scan`, and the base class of the backends that compute it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mixers.operators.backend import Backend, OperatorCall
from mixers.operators.validation import check_initial_state
from mixers.precision import accumulation_dtype


@dataclass(frozen=True, kw_only=True)
class SelectiveScanCall(OperatorCall):
    """One call of `selective_scan`, without its skip D.

    Attributes:
        dt: (b, l, h, v).
        A: (h, v, n).
        B, C: (b, l, h, n).
        u: (b, l, h, v).
    """

    operator: ClassVar[str] = "scan"
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    u: Tensor

    @property
    def tensors(self) -> Mapping[str, Tensor | None]:
        """The tensors, by the names of the operator's arguments."""
        return {"dt": self.dt, "A": self.A, "B": self.B, "C": self.C, "u": self.u}

    @property
    def decay(self) -> str:
        """`vector`: every channel of the state has its own gate."""
        return "vector"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of states and sums."""
        return accumulation_dtype(self.u, self.dt, self.A, self.B, self.C)


class SelectiveScanBackend(Backend[SelectiveScanCall]):
    """A backend of `selective_scan`.

    It overrides `causal`, `bidirectional` and `noncausal`, which return plain sums, so that scale, eps and
    normalization exist once.

    Attributes:
        takes_half_precision: whether the sums get half-precision B, C and u as they are, because the kernel accumulates
            in float32; otherwise they get float32 or float64, as they always do of dt, A and the memory.
    """

    operator = "scan"
    takes_half_precision: ClassVar[bool] = False

    def causal(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return decayed sums over tokens 0 … i and the memory, (b, l, h, v), and the final memory (b, h, v, n)."""
        raise NotImplementedError

    def bidirectional(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
        """Return sums over all tokens, decayed in both directions, (b, l, h, v)."""
        raise NotImplementedError

    def noncausal(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
        """Return means over all tokens, (b, l, h, v)."""
        raise NotImplementedError

    def run(self, call: SelectiveScanCall) -> tuple[Tensor, Tensor | None]:
        """Return the result (b, l, h, v) in `call.dtype`, and the final memory of a causal call.

        The other operators return the dtype of the values; here the skip D is still to be added.
        """
        dtype = call.u.dtype if self.takes_half_precision else call.dtype
        B, C, u = (t.to(dtype) for t in (call.B, call.C, call.u))
        dt, A = (t.to(call.dtype) for t in (call.dt, call.A))  # half precision would round the rates of decay
        if call.normalize:  # a channel of ones for every value channel, which decays as the value does
            dt = torch.cat([dt, dt], dim=-1)
            A = torch.cat([A, A], dim=1)
            u = torch.cat([u, torch.ones_like(u)], dim=-1)
        check_initial_state(call.initial_state, (u.shape[0], *A.shape), "(b, h, v or normalized 2·v, n)")
        memory = None
        if call.causality == "causal":
            start = call.initial_state.memory if call.initial_state else A.new_zeros(u.shape[0], *A.shape)
            y, memory = self.causal(dt, A, B, C, u, start.to(call.dtype))
        elif call.causality == "bidirectional":
            y = self.bidirectional(dt, A, B, C, u)
        else:
            y = self.noncausal(dt, A, B, C, u)
        y = y.to(call.dtype)
        if call.normalize:
            return _divide_by_ones(y, call.eps), memory
        return y * (u.shape[1] if call.causality == "noncausal" else 1) * call.scale, memory


def _divide_by_ones(y: Tensor, eps: float) -> Tensor:
    values, row_sums = y.chunk(2, dim=-1)
    return values / (row_sums + eps)
