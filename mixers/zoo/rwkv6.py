"""RWKV-6's time mixing, "Finch" (Peng et al. 2024, 2404.05892)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import operators
from mixers.config import MixerConfig
from mixers.entries import register_mixer
from mixers.image_grid import ImageGrid
from mixers.linear_mixer import LinearConfig, LinearMixer
from mixers.normalization import append_ones, divide_by_last
from mixers.operators.directions import advance_one_token, delay_one_token
from mixers.stages.decays import DoubleExponentialDecay
from mixers.stages.projections import ProjectionLayers, Projections
from mixers.stages.token_shift import TokenShift
from mixers.state_dicts import ConvertedStateDict, require_tensors
from mixers.streams import Streams
from mixers.traits import Causality, Traits

STREAMS = ("w", "k", "v", "r", "g")


@dataclass(frozen=True)
class RWKV6Config(LinearConfig):
    """Options of `rwkv6`.

    Attributes:
        bonus: the weight of a token for itself is learned, one u per key channel. Otherwise u = 1 with an order, and
            without one gates weigh tokens and nothing is added, as in the other families.
        token_shift: the inputs of the projections, of the decay and of the gate are interpolated with the previous
            token in scan order; the result then always depends on the order.
        shift_rank, decay_rank: ranks of the token shift and of the decay.
    """

    causality: Causality = "causal"
    normalize: bool = False
    norm: bool = True
    gate: bool = True
    bonus: bool = True
    token_shift: bool = True
    shift_rank: int = 32
    decay_rank: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift_rank <= 0 or self.decay_rank <= 0:
            raise ValueError(
                f"Expected shift_rank > 0 and decay_rank > 0, got {self.shift_rank} and {self.decay_rank}."
            )


@register_mixer("rwkv6")
class RWKV6(LinearMixer):
    """RWKV-6 (2404.05892): W_ij = Σ_c r_ic k_jc ∏_{t=j+1..i−1} w_tc for j < i, and W_ii = Σ_c u_c r_ic k_ic.

    w = exp(−exp(up(tanh(down(x))) + bias)): the gates of the tokens strictly between i and j. Bidirectional adds the
    mirror image for j > i; without an order, W_ij = Σ_c r_ic k_jc w_jc, with the bonus u added at i = j. Where rows
    are divided by sums, u is exp(u) > 0 in these, as in RWKV-4, and eps is added to the decayed sum, or without an
    order to the mean weight.
    GroupNorm per head and multiplication by SiLU(to_gate(x)) follow. to_q computes r.

    Deviations from the published block: initial values that depend on the depth are those at half depth, and the
    projections and the norm start as torch's layers. Published models start to_out at zero, to_q and to_v orthogonal,
    to_k and to_gate orthogonal times 0.1, and the norm's weight at ((1 + layer) / layers)^0.7.
    """

    Config: ClassVar[type[MixerConfig]] = RWKV6Config
    has_decay: ClassVar[bool] = True
    per_channel_decay: ClassVar[bool] = True
    drop_in_options: ClassVar[Mapping[str, Any]] = {"token_shift": False, "norm": False, "gate": False}
    tiny_options: ClassVar[Mapping[str, Any]] = {"shift_rank": 3, "decay_rank": 4}
    output_options: ClassVar[Mapping[str, Any]] = {"norm_kind": "head_group", "eps": 64e-5}

    config: RWKV6Config

    def __init__(self, config: RWKV6Config, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.decay = DoubleExponentialDecay(dim, self.key_width, config.decay_rank)
        self.token_shift = TokenShift(*_initial_shift(dim), config.shift_rank) if config.token_shift else None
        self.bonus = nn.Parameter(_initial_bonus(self.key_width).view(heads, -1)) if config.bonus else None

    def create_projections(self) -> Projections:
        """Create the mixer's own projections, without biases."""
        return Projections(self.dim, self.key_width, self.value_width, bias=False)

    def compute_streams(self, x: Tensor, projections: ProjectionLayers, grid: ImageGrid | None = None) -> Streams:
        """Compute projections and decay, each from its own interpolation; `x` becomes the input of the gate."""
        w, k, v, r, g = (x,) * len(STREAMS) if self.token_shift is None else self.token_shift(x)
        query, key, value = self.project(projections, r, k, v, grid)
        return Streams(g, query, key, value, log_decay=self.split_heads(self.decay(w)), grid=grid)

    def mix_directly(self, streams: Streams) -> Tensor:
        """Compute W v, (b, l, h, v), in float32 at least."""
        v = streams.values
        if not self.config.normalize:
            return self._apply_scaled(streams, v, self.scale_at(v.shape[1]))
        return divide_by_last(self._apply_scaled(streams, append_ones(v)), self._eps(v.shape[1]))

    def direct_matrix(self, streams: Streams) -> Tensor:
        """Compute W, (b, h, l, l), from its formula. Costs O(l²·k) memory."""
        length = streams.v.shape[1]
        if not self.config.normalize:
            return self._scaled_matrix(streams, self.scale_at(length))
        total = self._scaled_matrix(streams)
        return total / (total.sum(-1, keepdim=True) + self._eps(length))

    def apply_unnormalized(self, streams: Streams, v: Tensor, positive: bool = False) -> Tensor:
        """Apply the weights before any normalization to values v (b, l, h, ·): (b, l, h, ·)."""
        return self._apply_scaled(streams, v, 1 / v.shape[1] if self.averages_weights else 1.0, positive)

    def unnormalized_matrix(self, streams: Streams, positive: bool = False) -> Tensor:
        """Compute the matrix of `apply_unnormalized`, (b, h, l, l), from its formula. Costs O(l²·k) memory."""
        return self._scaled_matrix(streams, 1 / streams.v.shape[1] if self.averages_weights else 1.0, positive)

    def _apply_scaled(self, streams: Streams, v: Tensor, scale: float = 1.0, positive: bool = False) -> Tensor:
        assert streams.log_decay is not None
        q, k = self.signed_or_positive_features(streams, positive)
        q = q * scale
        log_decay = streams.log_decay
        y = self._diagonal(q, k, positive)[..., None] * v
        causality = self.config.causality
        sum_tokens = self._sum if causality == "noncausal" else self._sum_past
        y = y + sum_tokens(q, k, v, log_decay)
        if causality == "bidirectional":
            y = y + self._sum_past(q.flip(1), k.flip(1), v.flip(1), log_decay.flip(1)).flip(1)
        return y

    def _scaled_matrix(self, streams: Streams, scale: float = 1.0, positive: bool = False) -> Tensor:
        assert streams.log_decay is not None
        q, k = self.signed_or_positive_features(streams, positive)
        q = q * scale
        log_decay = streams.log_decay.to(q.dtype)
        total = torch.diag_embed(self._diagonal(q, k, positive).transpose(1, 2))
        causality = self.config.causality
        if causality == "noncausal":
            total = total + torch.einsum("bihk,bjhk->bhij", q, k * log_decay.exp())
        else:
            total = total + _past_matrix(q, k, log_decay)
        if causality == "bidirectional":
            total = total + _past_matrix(q.flip(1), k.flip(1), log_decay.flip(1)).flip(-1, -2)
        return total

    def _diagonal(self, q: Tensor, k: Tensor, positive: bool) -> Tensor:
        """Compute what a token's own key adds to W_ii, (b, l, h)."""
        if self.bonus is None:
            return (q * k).sum(-1) * float(self.config.causality != "noncausal")
        u = self.bonus.to(q.dtype)
        return (q * (u.exp() if positive or self.divides_by_row_sums else u) * k).sum(-1)

    def _sum_past(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        """Sum over the tokens before each: the state after token i − 1 is read by the query of token i."""
        return delay_one_token(self._sum(advance_one_token(q), k, v, log_decay))

    def _sum(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        causality: Causality = "noncausal" if self.config.causality == "noncausal" else "causal"
        sums = operators.linear_attention(
            q, k, v, log_decay, causality=causality, normalize=False, backend=self.config.backend
        )
        assert isinstance(sums, Tensor)
        return sums

    def _eps(self, length: int) -> float:
        """Return what is added to the row sum."""
        return self.config.eps * (length if self.config.causality == "noncausal" else 1)

    def operator_flops(self, length: int) -> int:
        """Return the operations of linear attention with decay, with one more value channel if normalized."""
        causality = self.config.causality
        return self.heads * sum(
            operators.linear.flops(length, self.key_dim, width, causality, "vector") for width in self.value_widths
        )

    @property
    def permutation_equivariant(self) -> bool:
        """Whether permuting the tokens only permutes the output: not with the token shift."""
        return super().permutation_equivariant and not self.config.token_shift

    @property
    def positive(self) -> bool:
        """Whether no entry of the mixing matrix is negative: the feature map and the bonus are positive."""
        return super().positive and (self.divides_by_row_sums or not self.config.bonus)

    @property
    def traits(self) -> Traits:
        """The properties of this mixer as configured; each of several repeated tokens has a bonus."""
        traits = super().traits
        return replace(traits, repetition_invariant=traits.repetition_invariant and not self.config.bonus)

    def operator_state_size(self, length: int) -> int:
        """Add the last token, with which the token shift interpolates the next one."""
        return super().operator_state_size(length) + (self.dim if self.config.token_shift else 0)

    def mixing_flops(self, length: int) -> int:
        """Add the operations of the decay and of the token shift."""
        shift = 0 if self.token_shift is None else self.token_shift.flops(length)
        return super().mixing_flops(length) + shift + 2 * length * self.config.decay_rank * (self.dim + self.key_width)

    @classmethod
    def convert_state_dict(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> ConvertedStateDict:
        """Convert the state dict of `fla`'s RWKV6Attention with expand_k = 1 and norm_eps = 64e-5, as in RWKV-LM."""
        names = {
            "x_proj.0.mu": "token_shift.mu",
            "bonus": "bonus",
            "o_proj.weight": "projections.to_out.weight",
            "w_proj.linear.lora.0.weight": "decay.down.weight",
            "w_proj.linear.lora.2.weight": "decay.up.weight",
            "w_proj.linear.lora.2.bias": "decay.up.bias",
            "g_norm.weight": "output.norm.weight",
            "g_norm.bias": "output.norm.bias",
            "r_proj.linear.weight": "projections.to_q.weight",
            "k_proj.linear.weight": "projections.to_k.weight",
            "v_proj.linear.weight": "projections.to_v.weight",
            "g_proj.linear.weight": "output.to_gate.weight",
        }
        shift_names = ("x_proj.0.linear.weight", "x_proj.2.weight", "x_bias")
        require_tensors(state, *names, *shift_names)
        tensors = {names.get(name, name): t for name, t in state.items() if name not in shift_names}
        order = ["rwkvg".index(stream) for stream in STREAMS]
        down, up, offsets = (state[name] for name in shift_names)
        down = down.unflatten(0, (len(STREAMS), -1))
        up = up.unflatten(1, (len(STREAMS), -1)).permute(1, 2, 0)
        tensors["token_shift.down.weight"] = down[order].flatten(0, 1)
        tensors["token_shift.up"] = up[order]
        tensors["token_shift.offsets"] = offsets[order]
        inner, dim = state["v_proj.linear.weight"].shape
        derived = {
            "expand": inner / dim,
            "shift_rank": up.shape[1],
            "decay_rank": len(state["w_proj.linear.lora.0.weight"]),
        }
        return ConvertedStateDict(dim, len(state["bonus"]), derived | dict(options), tensors)


DEPTH = 0.5
"""Position of the layer in its network, from 0 at the input to 1 at the output; initial values depend on it."""


def _initial_bonus(channels: int) -> Tensor:
    """Return the initial u of every key channel, (channels,), as published."""
    index = torch.arange(channels)
    return DEPTH * (1 - index / max(channels - 1, 1)) + ((index + 1) % 3 - 1) * 0.1


def _initial_shift(dim: int) -> tuple[Tensor, Tensor]:
    """Return the initial μ (d,) and μ_s (streams, d) of the token shift, as published."""
    ratio = torch.arange(dim) / dim
    slow = 1 - ratio ** (1 - DEPTH)
    fast = 1 - ratio ** (0.5 * (1 - DEPTH))
    offsets = {"w": slow, "k": slow, "v": slow - 0.3 * DEPTH, "r": fast, "g": fast}
    return slow, torch.stack([offsets[stream] for stream in STREAMS])


def _past_matrix(q: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
    """Compute W_ij = Σ_c q_ic k_jc exp(Σ_{t=j+1..i−1} log_decay_tc) for j < i, else 0: (b, h, l, l)."""
    index = torch.arange(q.shape[1], device=q.device)
    later = (index[:, None] > index)[None, :, :, None, None]  # (1, t, j, 1, 1): t > j
    through = (log_decay[:, :, None] * later).cumsum(1)  # (b, i, j, h, k): Σ_{t=j+1..i}
    between = F.pad(through, (0, 0, 0, 0, 0, 0, 1, -1))
    return torch.einsum("bihk,bjhk,bijhk->bhij", q, k, between.exp() * later)
