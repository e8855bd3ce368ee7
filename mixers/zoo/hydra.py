"""Hydra's quasiseparable mixer (Hwang et al. 2024, 2407.09941)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from mixers import operators
from mixers.mixer import Streams, upcast
from mixers.normalization import append_ones, divide_by_last
from mixers.registry import register_mixer
from mixers.stages.decays import ScalarDecay
from mixers.stages.projections import linear_in_full_precision
from mixers.state_space_mixer import StateSpaceConfig, StateSpaceMixer
from mixers.traits import Causality


@dataclass(frozen=True)
class HydraConfig(StateSpaceConfig):
    """Options of `hydra`.

    Attributes:
        shared_keys: both directions have one B and one C; as published each has its own.
        own_query: a token reads the state before it with its own C; as published, where the whole result is moved by
            one, with that of its neighbor on the side that it reads.
    """

    causality: Causality = "bidirectional"
    conv_size: int = 7
    skip: bool = False
    d_state: int | None = 64
    shared_keys: bool = False
    own_query: bool = False


@dataclass(frozen=True)
class HydraStreams(Streams):
    """With the diagonal δ (b, l, h); the directions are side by side in q, k (·, h, 2·n), Δ and log decay (·, 2·h)."""

    diagonal: Tensor | None = None


@register_mixer(
    "hydra",
    causalities=("causal", "bidirectional"),
    unsupported={"noncausal": "past and future are all that it tells apart; without an order use vssd with a skip"},
)
class Hydra(StateSpaceMixer):
    """Hydra (2407.09941): SSD over the past, SSD over the future, and a diagonal δ: a quasiseparable matrix.

        W_ij = C_{i−1}·B_j Δ_j ∏_{t=j+1..i−1} exp(Δ_t A) for j < i, mirrored for j > i, and W_ii = δ_i = fc(x_i) + D

    then RMSNorm(W x)·SiLU(z). Each direction has its own B, C and Δ; A and the bias of Δ are shared, one a head.
    A causal one has the past and the diagonal. Normalized, the diagonal is softplus(fc(x_i) + D) > 0, and eps is
    added to the row sum.
    """

    Config: ClassVar[Any] = HydraConfig
    has_decay: ClassVar[bool] = True
    drop_in_options: ClassVar[dict[str, Any]] = {
        **StateSpaceMixer.drop_in_options,
        "shared_keys": True,
        "own_query": True,
    }
    output_options: ClassVar[dict[str, Any]] = {"norm_kind": "rms"}

    def __init__(self, config: Any, dim: int, heads: int, *, own_projections: bool = True) -> None:
        self.directions = 1 if config.causality == "causal" else 2
        self.key_sets = 1 if config.shared_keys else self.directions
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.decay = ScalarDecay(dim, heads, a_range=(1.0, 1.0), directions=self.directions)
        self.diagonal = nn.Linear(self.value_width, heads)
        nn.init.ones_(self.diagonal.bias)  # D

    @property
    def key_width(self) -> int:
        """B and C of every direction and group."""
        return self.key_sets * super().key_width

    def split_key_heads(self, x: Tensor) -> Tensor:
        """(b, l, sets·groups·n) -> (b, l, h, sets·n)."""
        sizes = {"s": self.key_sets, "g": self.n_groups, "r": self.heads // self.n_groups}
        return repeat(x, "b l (s g n) -> b l (g r) (s n)", **sizes)

    def add_gates(self, streams: Streams) -> Streams:
        """Add Δ and Δ·A of every direction, and the diagonal."""
        dt, log_decay = self.decay(streams.x)
        diagonal = linear_in_full_precision(self.diagonal, streams.v.flatten(2))
        diagonal = F.softplus(diagonal) if self.config.normalize else diagonal
        return HydraStreams(
            streams.x, streams.q, streams.k, streams.v, log_decay=log_decay, dt=dt, grid=streams.grid, diagonal=diagonal
        )

    def mix(self, streams: Streams) -> Tensor:
        """W v, (b, l, h, v), float32 at least: the directions' sums, moved by one, and the diagonal."""
        assert isinstance(streams, HydraStreams) and streams.diagonal is not None
        v = streams.values
        v = append_ones(v) if self.config.normalize else v
        y = streams.diagonal[..., None] * v
        for direction, (q, k, log_decay) in enumerate(self._directions(streams)):
            turned = (q, k, v, log_decay) if direction == 0 else (t.flip(1) for t in (q, k, v, log_decay))
            part = self._before(*turned)
            y = y + (part if direction == 0 else part.flip(1))
        return divide_by_last(y, self.config.eps) if self.config.normalize else y

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """(b, h, l, l), from the formula."""
        assert isinstance(streams, HydraStreams) and streams.diagonal is not None
        total = torch.diag_embed(streams.diagonal.transpose(1, 2))
        settings: dict[str, Any] = {"causality": "causal", "normalize": False, "eps": 0.0, "scale": self.scale}
        for direction, (q, k, log_decay) in enumerate(self._directions(streams)):
            back = direction == 1
            q, k, log_decay = (t.flip(1) if back else t for t in (q, k, log_decay))
            moved = F.pad(operators.linear_weights(self._query(q), k, log_decay, **settings), (0, 0, 1, -1))
            total = total + (moved.flip(-1, -2) if back else moved)
        return total / (total.sum(-1, keepdim=True) + self.config.eps) if self.config.normalize else total

    def _directions(self, streams: Streams) -> list[tuple[Tensor, Tensor, Tensor]]:
        """φ(C), φ(B)·Δ and Δ·A of every direction."""
        assert streams.dt is not None and streams.log_decay is not None
        dtype = upcast(streams.q.dtype)
        q, k = (self._map.apply(t.to(dtype)).split(self.key_dim, dim=-1) for t in (streams.q, streams.k))
        steps, decays = (t.split(self.heads, dim=-1) for t in (streams.dt, streams.log_decay))
        sets = [min(n, self.key_sets - 1) for n in range(self.directions)]
        return [(q[s], k[s] * steps[n][..., None], decays[n]) for n, s in enumerate(sets)]

    def _before(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        """Decayed sums over the tokens before each."""
        sums = operators.linear_attention(
            self._query(q), k, v, log_decay, causality="causal", normalize=False, backend=self.config.backend
        )
        assert isinstance(sums, Tensor)
        return F.pad(sums, (0, 0, 0, 0, 1, -1))

    def _query(self, q: Tensor) -> Tensor:
        """What the state after each token is read with, before the result is moved by one."""
        return F.pad(q, (0, 0, 0, 0, -1, 1)) if self.config.own_query else q

    def operator_flops(self, length: int) -> int:
        """Those of causal linear attention with decay, once a direction."""
        width = self.head_dim + int(self.config.normalize)
        one = operators.linear.flops(length, self.key_dim, width, "causal", "scalar")
        return self.directions * self.heads * one

    def mixing_flops(self, length: int) -> int:
        """Those of the operator, Δ's and the diagonal's."""
        small = (self.dim * self.directions + self.value_width) * self.heads
        return super().mixing_flops(length) + 2 * length * small
