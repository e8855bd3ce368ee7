"""What `linear_attention` was asked for, checked, and how a backend answers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import Tensor

from mixers.feature_maps import FEATURE_MAPS
from mixers.normalization import append_ones, count_visible_tokens, divide_by_last
from mixers.operators.choice import Problem
from mixers.operators.common import working_dtype
from mixers.operators.state import State
from mixers.precision import accumulation_dtype, no_autocast
from mixers.traits import Causality


@dataclass(frozen=True)
class Call:
    """One call of `linear_attention`.

    Attributes:
        q, k: (b, l, h, k), before the feature map, in the caller's dtype.
        v: (b, l, h, v).
        log_decay: (b, l, h, 1 or k), or None.
        feature_map: the name of φ = ψ.
        causality, normalize, eps, scale: as of `linear_attention`.
        initial_state: of a causal pass, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    feature_map: str
    causality: Causality
    normalize: bool
    eps: float
    scale: float
    initial_state: State | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of features and sums."""
        return accumulation_dtype(self.q, self.k, self.v)

    @property
    def seen(self) -> int:
        """Tokens before the first."""
        return self.initial_state.tokens if self.initial_state else 0

    def mapped(self) -> Call:
        """The same with φ(q) and ψ(k) in place of q and k, in `dtype`; without an order the gates are in the keys."""
        apply, dtype = FEATURE_MAPS[self.feature_map].apply, self.dtype
        q, k = apply(self.q.to(dtype)), apply(self.k.to(dtype))
        gates = None if self.log_decay is None else self.log_decay.to(dtype)
        if gates is not None and self.causality == "noncausal":
            k, gates = k * gates.exp(), None
        return replace(self, q=q, k=k, log_decay=gates, feature_map="identity")


@dataclass(frozen=True)
class Backend:
    """A way to compute it.

    Attributes:
        sums: a module with functions on float32 or float64 tensors: `causal` and `bidirectional` give (decayed) sums
            and `noncausal` means over the tokens. `attend` makes the result of them, so that scale, eps and
            normalization exist once.
        whole: for a causality, a function that gives the result itself and, causal, the memory after the last token.
        refuses: see `mixers.operators.choice`; the formulations have none.
    """

    sums: ModuleType | None
    whole: Mapping[Causality, Callable[[Call], tuple[Tensor, Tensor | None]]] = field(default_factory=dict)
    refuses: Callable[[Problem], str | None] = lambda problem: None

    def attend(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """The result (b, l, h, v) in v's dtype, and of a causal pass the memory after the last token."""
        with no_autocast(call.q):
            if call.causality in self.whole:
                return self.whole[call.causality](call)
            assert self.sums is not None, "a backend refuses what it has no function for"
            return self._from_sums(self.sums, call.mapped())

    def _from_sums(self, sums: ModuleType, call: Call) -> tuple[Tensor, Tensor | None]:
        dtype = working_dtype(sums, call.v, call.q, call.k)
        q, k, v = call.q.to(dtype), call.k.to(dtype), call.v.to(dtype)
        gates, normalize = call.log_decay, call.normalize
        v = append_ones(v) if normalize else v
        memory = None
        if call.causality == "causal":
            start = call.initial_state.memory if call.initial_state else new_memory(k, v)
            mixed, memory = sums.causal(q, k, gates, v, start)
        elif call.causality == "bidirectional":
            mixed = sums.bidirectional(q, k, gates, v)
        else:
            mixed = sums.noncausal(q, k, v)
        mixed = mixed.to(call.dtype)
        counts = count_visible_tokens(q, call.causality, call.seen)[:, None, None]
        if call.causality != "noncausal" and normalize and gates is None:
            mixed = mixed / counts
        elif call.causality == "noncausal" and not normalize:
            mixed = mixed * counts
        y = divide_by_last(mixed, call.eps) if normalize else mixed * call.scale
        return y.to(call.v.dtype), memory


def new_memory(k: Tensor, v: Tensor) -> Tensor:
    """The memory of no tokens, (b, h, k, v)."""
    return k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1])
