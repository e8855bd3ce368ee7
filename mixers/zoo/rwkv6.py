"""RWKV-6's time mixing, "Finch" (Peng et al. 2024, 2404.05892)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import operators
from mixers.linear_mixer import LinearConfig, LinearMixer
from mixers.mixer import Streams
from mixers.normalization import append_ones, divide_by_last
from mixers.registry import register_mixer
from mixers.stages.decays import DoubleExponentialDecay
from mixers.stages.projections import Projections
from mixers.stages.token_shift import TokenShift
from mixers.state_dicts import ConvertedStateDict, require_tensors
from mixers.traits import Causality, Traits

STREAMS = ("w", "k", "v", "r", "g")


@dataclass(frozen=True)
class RWKV6Config(LinearConfig):
    """Options of `rwkv6`.

    Attributes:
        bonus: how strongly a token sees itself is learned, one u a key channel; else u = 1 where there is an order,
            and without one the mixer is that of every other family: gates weigh tokens, and nothing is added.
        token_shift: what the projections, decay and gate see is mixed with the token before, in the order of the
            scan; then the mixer is never permutation-equivariant.
        shift_rank, decay_rank: of the projections of the two.
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

    w = exp(−exp(up(tanh(down(x))) + bias)): gates of the tokens between two, of neither of them. Bidirectional has
    the mirror image for j > i; without an order W_ij = Σ_c r_ic k_jc w_jc, with the bonus u added at i = j. Normalized
    u is exp(u) > 0, as it was in RWKV-4, and eps is added to the decayed sum, or without an order to the mean weight.
    GroupNorm, one a head, and SiLU(to_gate(x)) follow. r is to_q.
    """

    Config: ClassVar[Any] = RWKV6Config
    has_decay: ClassVar[bool] = True
    per_channel_decay: ClassVar[bool] = True
    drop_in_options: ClassVar[dict[str, Any]] = {"token_shift": False, "norm": False, "gate": False}
    tiny_options: ClassVar[dict[str, Any]] = {"shift_rank": 3, "decay_rank": 4}
    output_options: ClassVar[dict[str, Any]] = {"norm_kind": "head_group", "eps": 64e-5}

    def __init__(self, config: Any, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.decay = DoubleExponentialDecay(dim, self.key_width, config.decay_rank)
        self.token_shift = TokenShift(dim, len(STREAMS), config.shift_rank) if config.token_shift else None
        channels = torch.arange(self.key_width)  # as published, at half the depth of a network
        start = (1 - channels / max(self.key_width - 1, 1)) / 2 + ((channels + 1) % 3 - 1) * 0.1
        self.bonus = nn.Parameter(start.view(heads, -1)) if config.bonus else None

    def create_projections(self) -> Projections:
        """Projections without a bias."""
        return Projections(self.dim, self.key_width, self.value_width, bias=False)

    def compute_streams(self, x: Tensor, host: Any, grid: tuple[int, int] | None = None) -> Streams:
        """Projections and decay, each of its own mixture of tokens; `x` is the one that the output's gate sees."""
        w, k, v, r, g = (x,) * len(STREAMS) if self.token_shift is None else self.token_shift(x)
        return Streams(g, *self.project(host, r, k, v), log_decay=self.split_heads(self.decay(w)), grid=grid)

    def mix(self, streams: Streams) -> Tensor:
        """W v, (b, l, h, v), float32 at least."""
        assert streams.log_decay is not None
        q, k = self.features(streams)
        v = streams.values
        v = append_ones(v) if self.config.normalize else v
        y = self._diagonal(q, k)[..., None] * v
        order = self.config.causality
        if order == "noncausal":
            y = y + self._sums(q, k, v, streams.log_decay)
        else:
            y = y + self._past(q, k, v, streams.log_decay)
        if order == "bidirectional":
            y = y + self._past(*(t.flip(1) for t in (q, k, v, streams.log_decay))).flip(1)
        return divide_by_last(y, self._eps(v.shape[1])) if self.config.normalize else y

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """(b, h, l, l), from the formula. O(l²·k) memory."""
        assert streams.log_decay is not None
        q, k = self.features(streams)
        order, log_decay = self.config.causality, streams.log_decay.to(q.dtype)
        total = torch.diag_embed(self._diagonal(q, k).transpose(1, 2))
        if order == "noncausal":
            total = total + torch.einsum("bihk,bjhk->bhij", q, k * log_decay.exp())
        else:
            total = total + _past_weights(q, k, log_decay)
        if order == "bidirectional":
            total = total + _past_weights(*(t.flip(1) for t in (q, k, log_decay))).flip(-1, -2)
        return total / (total.sum(-1, keepdim=True) + self._eps(q.shape[1])) if self.config.normalize else total

    def _diagonal(self, q: Tensor, k: Tensor) -> Tensor:
        """What a token's own key adds to W_ii, (b, l, h)."""
        if self.bonus is None:
            return (q * k).sum(-1) * float(self.config.causality != "noncausal")
        u = self.bonus.to(q.dtype)
        return (q * (u.exp() if self.config.normalize else u) * k).sum(-1)

    def _past(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        """Decayed sums over the tokens before each: the state after token i − 1 is read by the query of token i."""
        return F.pad(self._sums(F.pad(q, (0, 0, 0, 0, -1, 1)), k, v, log_decay), (0, 0, 0, 0, 1, -1))

    def _sums(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        order: Causality = "noncausal" if self.config.causality == "noncausal" else "causal"
        sums = operators.linear_attention(
            q, k, v, log_decay, causality=order, normalize=False, backend=self.config.backend
        )
        assert isinstance(sums, Tensor)
        return sums

    def operator_flops(self, length: int) -> int:
        """Those of linear attention with decay, normalized with one column of the values more."""
        width = self.head_dim + int(self.config.normalize)
        return self.heads * operators.linear.flops(length, self.key_dim, width, self.config.causality, "vector")

    def _eps(self, length: int) -> float:
        """What is added to the row sum."""
        return self.config.eps * (length if self.config.causality == "noncausal" else 1)

    @property
    def permutation_equivariant(self) -> bool:
        """Whether permuting the tokens permutes the output: not where each is mixed with the one before."""
        return super().permutation_equivariant and not self.config.token_shift

    @property
    def positive(self) -> bool:
        """Whether every weight is ≥ 0: the feature map's and the bonus."""
        return super().positive and (self.config.normalize or not self.config.bonus)

    @property
    def traits(self) -> Traits:
        """What this mixer, as configured, promises; repeated tokens have a bonus each."""
        promised = super().traits
        return replace(promised, repetition_invariant=promised.repetition_invariant and not self.config.bonus)

    def state_size(self, length: int) -> int:
        """That of linear attention, and the last token where the next one is mixed with it."""
        return super().state_size(length) + (self.dim if self.config.token_shift else 0)

    def mixing_flops(self, length: int) -> int:
        """Those of linear attention, the decay's and the token shift's."""
        shift = 0 if self.token_shift is None else self.token_shift.flops(length)
        return super().mixing_flops(length) + shift + 2 * length * self.config.decay_rank * (self.dim + self.key_width)

    @classmethod
    def convert_state_dict(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> ConvertedStateDict:
        """Of `fla`'s RWKV6Attention with keys as wide as the model (expand_k 1) and norm_eps 64e-5, as in RWKV-LM."""
        names = {"x_proj.0.mu": "token_shift.mu", "bonus": "bonus", "o_proj.weight": "projections.to_out.weight"}
        names |= {"w_proj.linear.lora.0.weight": "decay.down.weight"}
        names |= {f"w_proj.linear.lora.2.{kind}": f"decay.up.{kind}" for kind in ("weight", "bias")}
        names |= {f"g_norm.{kind}": f"output.norm.{kind}" for kind in ("weight", "bias")}
        parts = {"r": "projections.to_q", "k": "projections.to_k", "v": "projections.to_v", "g": "output.to_gate"}
        names |= {f"{part}_proj.linear.weight": f"{ours}.weight" for part, ours in parts.items()}
        shift = ("x_proj.0.linear.weight", "x_proj.2.weight", "x_bias")
        require_tensors(state, " ".join([*names, *shift]))
        found = {names.get(n, n): t for n, t in state.items() if n not in shift}
        order = ["rwkvg".index(stream) for stream in STREAMS]
        down, up, offsets = (state[name] for name in shift)
        down, up = down.unflatten(0, (len(STREAMS), -1)), up.unflatten(1, (len(STREAMS), -1)).permute(1, 2, 0)
        found |= {"token_shift.down.weight": down[order].flatten(0, 1), "token_shift.up": up[order]}
        found |= {"token_shift.offsets": offsets[order]}
        inner, dim = state["v_proj.linear.weight"].shape
        ranks = {"shift_rank": up.shape[1], "decay_rank": len(state["w_proj.linear.lora.0.weight"])}
        return ConvertedStateDict(dim, len(state["bonus"]), {"expand": inner / dim, **ranks, **options}, found)


def _past_weights(q: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
    """W_ij = Σ_c q_ic k_jc exp(Σ_{t=j+1..i−1} log_decay_tc) for j < i, else 0: (b, h, l, l)."""
    length = q.shape[1]
    places = torch.arange(length, device=q.device)
    later = (places[:, None] > places)[None, :, :, None, None]  # (1, t, j, 1, 1): t > j
    through = (log_decay[:, :, None] * later).cumsum(1)  # (b, i, j, h, k): Σ_{t=j+1..i}
    between = F.pad(through, (0, 0, 0, 0, 0, 0, 1, -1))
    return torch.einsum("bihk,bjhk,bijhk->bhij", q, k, between.exp() * later)
