"""Hydra's quasiseparable mixer (Hwang et al. 2024, 2407.09941)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from mixers import operators
from mixers.config import MixerConfig
from mixers.entries import register_mixer
from mixers.feature_maps import FEATURE_MAPS
from mixers.operators.directions import advance_one_token, delay_one_token
from mixers.precision import accumulation_dtype
from mixers.stages.decays import ScalarDecay
from mixers.stages.projections import FullPrecisionLinear
from mixers.state_space_mixer import MultiPassMixer, StateSpaceConfig
from mixers.streams import Streams
from mixers.traits import Causality


@dataclass(frozen=True)
class HydraConfig(StateSpaceConfig):
    """Options of `hydra`.

    Attributes:
        shared_keys: both directions share B and C; published: each direction has its own.
        own_query: a token reads the state before it with its own C. Published: with the C of the neighbor on the side
            that it reads, because the whole result is shifted by one token.
    """

    causality: Causality = "bidirectional"
    conv_size: int = 7
    skip: bool = False
    d_state: int | None = 64
    shared_keys: bool = False
    own_query: bool = False


@dataclass(frozen=True)
class HydraStreams(Streams):
    """Streams with the diagonal δ (b, l, h).

    The directions are side by side: q and k are (b, l, h, 2·n), dt and log_decay are (b, l, 2·h).
    """

    diagonal: Tensor | None = None


@register_mixer(
    "hydra",
    causalities=("causal", "bidirectional"),
    unsupported={"noncausal": "it distinguishes past and future only; without an order, use vssd with skip=True"},
)
class Hydra(MultiPassMixer):
    """Hydra (2407.09941): SSD over the past, SSD over the future, and a diagonal δ: a quasiseparable matrix.

        W_ij = C_{i−1}·B_j Δ_j ∏_{t=j+1..i−1} exp(Δ_t A) for j < i, mirrored for j > i, and W_ii = δ_i = fc(x_i) + D

    followed by RMSNorm(W x)·SiLU(z). Each direction has its own B, C and Δ; A and the bias of Δ are shared, one per
    head. A causal one has the past and the diagonal. Where rows are divided by sums, the diagonal in these sums is
    softplus(fc(x_i) + D) > 0, and eps is added to them.
    """

    Config: ClassVar[type[MixerConfig]] = HydraConfig
    has_decay: ClassVar[bool] = True
    drop_in_options: ClassVar[Mapping[str, Any]] = {
        **MultiPassMixer.drop_in_options,
        "shared_keys": True,
        "own_query": True,
    }
    output_options: ClassVar[Mapping[str, Any]] = {"norm_kind": "rms"}

    config: HydraConfig

    def __init__(self, config: HydraConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        self.directions = 1 if config.causality == "causal" else 2
        self.key_sets = 1 if config.shared_keys else self.directions
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.decay = ScalarDecay(dim, heads, a_range=(1.0, 1.0), directions=self.directions)
        self.diagonal = FullPrecisionLinear(self.value_width, heads)
        nn.init.ones_(self.diagonal.bias)  # D

    @property
    def key_width(self) -> int:
        """Channels of B and of C of all directions and groups."""
        return self.key_sets * super().key_width

    def split_key_heads(self, x: Tensor) -> Tensor:
        """Give each head the channels of its group, (b, l, sets·groups·n) -> (b, l, h, sets·n)."""
        sizes = {"s": self.key_sets, "g": self.n_groups, "r": self.heads // self.n_groups}
        return repeat(x, "b l (s g n) -> b l (g r) (s n)", **sizes)

    def add_gates(self, streams: Streams) -> Streams:
        """Add Δ and Δ·A of every direction, and the diagonal."""
        dt, log_decay = self.decay(streams.x)
        diagonal = self.diagonal(streams.v.flatten(2))
        return HydraStreams(
            x=streams.x,
            q=streams.q,
            k=streams.k,
            v=streams.v,
            log_decay=log_decay,
            dt=dt,
            grid=streams.grid,
            diagonal=diagonal,
        )

    def apply_unnormalized(self, streams: Streams, v: Tensor, positive: bool = False) -> Tensor:
        """Add the shifted sums of each direction, and the diagonal: (b, l, h, ·), float32 at least."""
        y = self._diagonal(streams, positive)[..., None] * v
        for direction, (q, k, log_decay) in enumerate(self._directions(streams, positive)):
            if direction == 0:
                y = y + self._sum_past(q, k, v, log_decay)
            else:
                y = y + self._sum_past(q.flip(1), k.flip(1), v.flip(1), log_decay.flip(1)).flip(1)
        return y

    def unnormalized_matrix(self, streams: Streams, positive: bool = False) -> Tensor:
        """Compute the matrix that `apply_unnormalized` applies, (b, h, l, l), from its formula."""
        total = torch.diag_embed(self._diagonal(streams, positive).transpose(1, 2))
        for direction, (q, k, log_decay) in enumerate(self._directions(streams, positive)):
            if direction == 0:
                total = total + self._past_matrix(q, k, log_decay)
            else:
                total = total + self._past_matrix(q.flip(1), k.flip(1), log_decay.flip(1)).flip(-1, -2)
        return total

    def _diagonal(self, streams: Streams, positive: bool) -> Tensor:
        """Return δ (b, l, h), > 0 if rows are divided by sums of it."""
        assert isinstance(streams, HydraStreams) and streams.diagonal is not None
        return F.softplus(streams.diagonal) if positive or self.divides_by_row_sums else streams.diagonal

    def _directions(self, streams: Streams, positive: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return φ(C), φ(B)·Δ and Δ·A of every direction."""
        assert streams.dt is not None and streams.log_decay is not None
        dtype = accumulation_dtype(streams.q)
        feature_map = FEATURE_MAPS["relu"] if positive else self.feature_map
        queries = feature_map.apply(self.scaled_q(streams).to(dtype)).split(self.key_dim, dim=-1)
        keys = feature_map.apply(self.scaled_k(streams.k).to(dtype)).split(self.key_dim, dim=-1)
        steps = streams.dt.split(self.heads, dim=-1)
        decays = streams.log_decay.split(self.heads, dim=-1)
        key_sets = [min(direction, self.key_sets - 1) for direction in range(self.directions)]
        return [(queries[s], keys[s] * steps[n][..., None], decays[n]) for n, s in enumerate(key_sets)]

    def _sum_past(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        """Sum over the tokens before each token, with decay: (b, l, h, v)."""
        sums = operators.linear_attention(
            self._shift_query(q), k, v, log_decay, causality="causal", normalize=False, backend=self.config.backend
        )
        assert isinstance(sums, Tensor)
        return delay_one_token(sums)

    def _past_matrix(self, q: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
        """Compute the matrix of `_sum_past`, (b, h, l, l)."""
        matrix = operators.linear_attention_matrix(
            self._shift_query(q), k, log_decay, causality="causal", normalize=False, eps=0.0, scale=1.0
        )
        return F.pad(matrix, (0, 0, 1, -1))

    def _shift_query(self, q: Tensor) -> Tensor:
        """Return the queries that read the state after each token, before the result is shifted by one."""
        return advance_one_token(q) if self.config.own_query else q

    def operator_flops(self, length: int) -> int:
        """Return the operations of causal linear attention with decay in each direction."""
        one_direction = sum(
            operators.linear.flops(length, self.key_dim, width, "causal", "scalar") for width in self.value_widths
        )
        return self.directions * self.heads * one_direction

    def mixing_flops(self, length: int) -> int:
        """Add the operations of Δ and of the diagonal."""
        inputs = self.dim * self.directions + self.value_width
        return super().mixing_flops(length) + 2 * length * inputs * self.heads
