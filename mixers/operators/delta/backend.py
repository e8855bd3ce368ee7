"""A call of `delta_rule`, and the base class of the backends that compute it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mixers.normalization import append_ones, divide_by_last
from mixers.operators.backend import Backend, OperatorCall
from mixers.precision import accumulation_dtype


@dataclass(frozen=True, kw_only=True)
class DeltaRuleCall(OperatorCall):
    """One call of `delta_rule`.

    Attributes:
        q: (b, l, h, k).
        k: (b, l, h, k).
        beta: (b, l, h).
        log_decay: (b, l, h, 1 or k); zeros without decay.
        v: (b, l, h, v).
        decays: whether the caller gave a log decay.
    """

    operator: ClassVar[str] = "delta"
    q: Tensor
    k: Tensor
    beta: Tensor
    log_decay: Tensor
    v: Tensor
    decays: bool

    @property
    def tensors(self) -> Mapping[str, Tensor | None]:
        """The tensors, by the names of the operator's arguments."""
        log_decay = self.log_decay if self.decays else None
        return {"q": self.q, "k": self.k, "beta": self.beta, "log_decay": log_decay, "v": self.v}

    @property
    def decay(self) -> str:
        """`none`, `scalar` (one gate per token and head) or `vector` (one per key channel)."""
        if not self.decays:
            return "none"
        return "scalar" if self.log_decay.shape[-1] == 1 else "vector"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of states and sums."""
        return accumulation_dtype(self.v, self.q, self.k, self.beta, self.log_decay)


class DeltaRuleBackend(Backend[DeltaRuleCall]):
    """A backend of `delta_rule`; it overrides `causal`, `bidirectional` and `noncausal`.

    These return what tokens read, so that scale, eps and normalization exist once, here. Log decays are
    (b, l, h, 1 or k).

    Attributes:
        takes_half_precision: whether they get half-precision tensors as they are, because the kernel accumulates in
            float32; otherwise they get float32 or float64.
    """

    operator = "delta"
    takes_half_precision: ClassVar[bool] = False

    def causal(
        self, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what tokens read of tokens 0 … i and the memory, (b, l, h, v), and the final memory (b, h, k, v)."""
        raise NotImplementedError

    def bidirectional(self, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor) -> Tensor:
        """Return what tokens read in both directions, (b, l, h, v)."""
        raise NotImplementedError

    def noncausal(self, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, v: Tensor) -> Tensor:
        """Return what tokens read after one step on all tokens at once, (b, l, h, v)."""
        raise NotImplementedError

    def run(self, call: DeltaRuleCall) -> tuple[Tensor, Tensor | None]:
        """Return the result (b, l, h, v) in v's dtype, and the final memory of a causal call."""
        dtype = call.v.dtype if self.takes_half_precision else call.dtype
        q, k, beta, log_decay, v = (t.to(dtype) for t in (call.q, call.k, call.beta, call.log_decay, call.v))
        v = append_ones(v) if call.normalize else v
        memory = None
        if call.causality == "causal":
            start = call.initial_state.memory if call.initial_state else empty_memory(k, v)
            y, memory = self.causal(q, k, beta, log_decay, v, start.to(call.dtype))
        elif call.causality == "bidirectional":
            y = self.bidirectional(q, k, beta, log_decay, v)
        else:
            y = self.noncausal(q, k, beta, log_decay, v)
        y = y.to(call.dtype)
        y = divide_by_last(y, call.eps) if call.normalize else y * call.scale
        return y.to(call.v.dtype), memory


def empty_memory(k: Tensor, v: Tensor) -> Tensor:
    """Return the memory of no tokens, (b, h, k, v)."""
    return k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1])
