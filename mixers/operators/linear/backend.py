"""A call of `linear_attention`, and the base class of the backends that compute it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mixers.feature_maps import FEATURE_MAPS
from mixers.normalization import append_ones, count_visible_tokens, divide_by_last
from mixers.operators.backend import Backend, OperatorCall
from mixers.precision import accumulation_dtype


@dataclass(frozen=True, kw_only=True)
class LinearAttentionCall(OperatorCall):
    """One call of `linear_attention`.

    Attributes:
        q: (b, l, h, k), before the feature map, in the caller's dtype. Its axis of heads may have size 1: then all
            heads share it.
        k: likewise.
        v: (b, l, h, v).
        log_decay: (b, l, h, 1 or k), or None.
        feature_map: the name of φ.
    """

    operator: ClassVar[str] = "linear"
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    feature_map: str = "identity"

    @property
    def tensors(self) -> Mapping[str, Tensor | None]:
        """The tensors, by the names of the operator's arguments."""
        return {"q": self.q, "k": self.k, "v": self.v, "log_decay": self.log_decay}

    @property
    def decay(self) -> str:
        """`none`, `scalar` (one gate per token and head) or `vector` (one per key channel)."""
        if self.log_decay is None:
            return "none"
        return "scalar" if self.log_decay.shape[-1] == 1 else "vector"

    @property
    def has_order(self) -> bool:
        """Whether the result depends on the order of the tokens."""
        return self.causality == "causal" or (self.causality == "bidirectional" and self.log_decay is not None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of features and sums."""
        return accumulation_dtype(self.q, self.k, self.v)

    def with_all_heads(self) -> LinearAttentionCall:
        """Return the call with shared queries and keys repeated for every head, as views."""
        heads = self.v.shape[2]
        return replace(self, q=self.q.expand(-1, -1, heads, -1), k=self.k.expand(-1, -1, heads, -1))

    def with_features(self) -> LinearAttentionCall:
        """Return the call with φ(q) and φ(k) in place of q and k, in `dtype`; non-causal gates go into the keys."""
        apply = FEATURE_MAPS[self.feature_map].apply
        q = apply(self.q.to(self.dtype))
        k = apply(self.k.to(self.dtype))
        log_decay = None if self.log_decay is None else self.log_decay.to(self.dtype)
        if log_decay is not None and self.causality == "noncausal":
            k = k * log_decay.exp()
            log_decay = None
        return replace(self, q=q, k=k, log_decay=log_decay, feature_map="identity")


class LinearAttentionBackend(Backend[LinearAttentionCall]):
    """A backend of `linear_attention`.

    It overrides either `causal`, `bidirectional` and `noncausal`, which return plain sums, so that scale, eps and
    normalization exist once, or `run`, which returns the final result.

    Attributes:
        takes_half_precision: whether the sums get half-precision tensors as they are, because the kernels accumulate
            in float32; otherwise they get float32 or float64.
    """

    operator = "linear"
    takes_half_precision: ClassVar[bool] = False

    def causal(
        self, q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return decayed sums over tokens 0 … i and over the memory, (b, l, h, v), and the final memory."""
        raise NotImplementedError

    def bidirectional(self, q: Tensor, k: Tensor, log_decay: Tensor | None, v: Tensor) -> Tensor:
        """Return sums over all tokens, decayed in both directions, (b, l, h, v)."""
        raise NotImplementedError

    def noncausal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return means over all tokens, (b, l, h, v)."""
        raise NotImplementedError

    def run(self, call: LinearAttentionCall) -> tuple[Tensor, Tensor | None]:
        """Return the result (b, l, h, v) in v's dtype, and the final memory of a causal call."""
        call = call.with_all_heads().with_features()
        dtype = call.v.dtype if self.takes_half_precision else call.dtype
        q = call.q.to(dtype)
        k = call.k.to(dtype)
        v = call.v.to(dtype)
        v = append_ones(v) if call.normalize else v
        memory = None
        if call.causality == "causal":
            start = call.initial_state.memory if call.initial_state else empty_memory(k, v)
            mixed, memory = self.causal(q, k, call.log_decay, v, start.to(call.dtype))
        elif call.causality == "bidirectional":
            mixed = self.bidirectional(q, k, call.log_decay, v)
        else:
            mixed = self.noncausal(q, k, v)
        return self._finish(call, mixed.to(call.dtype)).to(call.v.dtype), memory

    def _finish(self, call: LinearAttentionCall, mixed: Tensor) -> Tensor:
        """Normalize or scale; eps belongs to the mean weight unless the weights decay with the order."""
        counts = count_visible_tokens(mixed, call.causality, call.past)[:, None, None]
        is_mean = call.causality == "noncausal"
        if not call.normalize:
            return (mixed * counts if is_mean else mixed) * call.scale
        if not is_mean and call.log_decay is None:
            mixed = mixed / counts
        return divide_by_last(mixed, call.eps)


def empty_memory(k: Tensor, v: Tensor) -> Tensor:
    """Return the memory of no tokens, (b, h, k, v)."""
    return k.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])
