"""Mamba-3's state-space model, SISO (2603.15569)."""

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
from mixers.operators.directions import advance_one_token, delay_one_token
from mixers.stages.outputs import RMSNorm
from mixers.stages.trapezoid import TrapezoidalDiscretization, rotate_cumulatively
from mixers.state_dicts import ConvertedStateDict, require_tensors, split_rows
from mixers.state_space_mixer import MultiPassMixer, StateSpaceConfig
from mixers.streams import Streams


@dataclass(frozen=True)
class Mamba3Config(StateSpaceConfig):
    """Options of `mamba3`.

    Attributes:
        bc_norm: RMSNorm of B and of C, over the channels of a group.
        bc_bias: add a learned bias, initially 1, to B and to C of every head after that norm.
        rotate_state: rotate pairs of channels of the state at every step, by angles computed from the token. None: as
            published; False if rows are divided by their sums, because rotated features are signed.
        rope_fraction: share of the channels that rotate; at least one pair does.
        rate: function that makes decay rates positive: `heavy_tail` as in mamba_ssm, or `softplus` as in fla.
    """

    conv_size: int = 0
    norm: bool = False
    bc_norm: bool = True
    bc_bias: bool = True
    rotate_state: bool | None = None
    rope_fraction: float = 0.5
    rate: str = "heavy_tail"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rope_fraction <= 1:
            raise ValueError(
                f"Expected 0 < rope_fraction ≤ 1, got {self.rope_fraction}; rotate_state=False rotates none."
            )
        if self.rotate_state and self.row_normalizer == "row_sum":
            raise ValueError(
                "normalizer='row_sum' needs positive features, and rotate_state=True makes them signed: use "
                "rotate_state=False, or another normalizer."
            )

    @property
    def rotates(self) -> bool:
        """Whether the state rotates."""
        return self.row_normalizer != "row_sum" if self.rotate_state is None else self.rotate_state


@dataclass(frozen=True)
class Mamba3Streams(Streams):
    """Streams with the share λ (b, l, h) of the trapezoid, and the angles (b, l, h, pairs) of every step or None."""

    trapezoid: Tensor | None = None
    angles: Tensor | None = None


@register_mixer(
    "mamba3",
    causalities=("causal", "bidirectional"),
    unsupported={
        "noncausal": "the trapezoid joins each token with the one before it, and the state rotates along the order; "
        "without an order, use vssd"
    },
)
class Mamba3(MultiPassMixer):
    """Mamba-3 (2603.15569): S_t = α_t R_t S_{t−1} + (1 − λ_t) Δ_t α_t R_t B_{t−1} x_{t−1}ᵀ + λ_t Δ_t B_t x_tᵀ, y = C S.

    The trapezoidal rule: a step weighs its own token by λ and the one before by 1 − λ. α_t = exp(Δ_t A_t), with A
    computed from the token, and R_t rotates pairs of channels of the state by minus the token's angles. As a matrix,
    with θ_t the sum of the angles up to token t,

        W_ij = R(θ_i) C_i · R(θ_j) B_j (λ_j Δ_j + (1 − λ_{j+1}) Δ_{j+1}) ∏_{t=j+1..i} α_t for j < i,

    and W_ii = C_i·B_i λ_i Δ_i. B and C pass through RMSNorm and get a bias per head; there is no convolution. Then
    (W x + D x)·SiLU(z), or with norm=True RMSNorm per head in between. Bidirectional adds the mirror image.

    Deviations from the published block: of the published variants, the one with a single input and output (SISO).
    """

    Config: ClassVar[type[MixerConfig]] = Mamba3Config
    has_decay: ClassVar[bool] = True
    drop_in_options: ClassVar[Mapping[str, Any]] = {
        "expand": 1,
        "skip": False,
        "gate": False,
        "d_state": None,
        "n_groups": None,
        "bc_norm": False,
        "bc_bias": False,
    }
    output_options: ClassVar[Mapping[str, Any]] = {"norm_kind": "rms"}

    config: Mamba3Config

    def __init__(self, config: Mamba3Config, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.decay = TrapezoidalDiscretization(dim, heads, self.rotated_pairs, config.rate, config.bias)
        self.B_norm = RMSNorm(self.key_dim) if config.bc_norm else None
        self.C_norm = RMSNorm(self.key_dim) if config.bc_norm else None
        self.B_bias = nn.Parameter(torch.ones(heads, self.key_dim)) if config.bc_bias else None
        self.C_bias = nn.Parameter(torch.ones(heads, self.key_dim)) if config.bc_bias else None
        if config.norm:
            self.output.norm = RMSNorm(self.value_width, groups=heads)

    @property
    def rotated_pairs(self) -> int:
        """Number of pairs of channels that rotate."""
        if not self.config.rotates:
            return 0
        if self.key_dim < 2:
            raise ValueError(
                "mamba3 needs d_state ≥ 2 for a rotating state: pass rotate_state=False, or more channels."
            )
        return max(1, int(self.key_dim * self.config.rope_fraction) // 2)

    @property
    def heads_per_group(self) -> int:
        """1: every head has its own angles."""
        return 1

    def add_gates(self, streams: Streams) -> Streams:
        """Normalize B and C, and add Δ, Δ·A, λ and the angles."""
        steps = self.decay(streams.x)
        return Mamba3Streams(
            x=streams.x,
            q=_normalize(streams.q, self.C_norm, self.C_bias),
            k=_normalize(streams.k, self.B_norm, self.B_bias),
            v=streams.v,
            log_decay=steps.log_decay,
            dt=steps.dt,
            grid=streams.grid,
            trapezoid=steps.trapezoid,
            angles=steps.angles,
        )

    def apply_unnormalized(self, streams: Streams, v: Tensor, positive: bool = False) -> Tensor:
        """Add the own token and the sums over the tokens on each side: (b, l, h, ·), float32 at least."""
        own, sides = self._matrix_parts(streams, positive)
        y = own[..., None] * v
        for direction, (q, k, log_decay) in enumerate(sides):
            values = v.flip(1) if direction else v
            sums = operators.linear_attention(
                q, k, values, log_decay, causality="causal", normalize=False, backend=self.config.backend
            )
            assert isinstance(sums, Tensor)
            past = delay_one_token(sums)
            y = y + (past.flip(1) if direction else past)
        return y

    def unnormalized_matrix(self, streams: Streams, positive: bool = False) -> Tensor:
        """Compute the matrix that `apply_unnormalized` applies, (b, h, l, l), from its formula."""
        own, sides = self._matrix_parts(streams, positive)
        total = torch.diag_embed(own.transpose(1, 2))
        for direction, (q, k, log_decay) in enumerate(sides):
            matrix = operators.linear_attention_matrix(
                q, k, log_decay, causality="causal", normalize=False, eps=0.0, scale=1.0
            )
            past = F.pad(matrix, (0, 0, 1, -1))
            total = total + (past.flip(-1, -2) if direction else past)
        return total

    def _matrix_parts(self, streams: Streams, positive: bool) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """Return W_ii, (b, l, h), and queries, keys and log decays of the sums over the past and over the future.

        The query of token i stands at token i − 1, whose state it reads: it contains its own decay and rotation. The
        keys of token j contain the share of the next token, which is known when they are read.
        """
        assert isinstance(streams, Mamba3Streams) and streams.trapezoid is not None
        assert streams.dt is not None and streams.log_decay is not None
        q, k = self.signed_or_positive_features(replace(streams, dt=None), positive)
        dt, trapezoid, log_decay = (t.to(q.dtype) for t in (streams.dt, streams.trapezoid, streams.log_decay))
        angles = None if positive else streams.angles
        own = trapezoid * dt
        carried = (1 - trapezoid) * dt
        sides = [_past_operands(q, k, own, carried, log_decay, angles)]
        if self.config.causality == "bidirectional":
            reversed_angles = None if angles is None else angles.flip(1)
            sides.append(
                _past_operands(q.flip(1), k.flip(1), own.flip(1), carried.flip(1), log_decay.flip(1), reversed_angles)
            )
        return own * (q * k).sum(-1), sides

    @property
    def positive(self) -> bool:
        """Whether no entry of the mixing matrix is negative: not with rotation, which makes features signed."""
        return super().positive and not self.config.rotates

    def operator_state_size(self, length: int) -> int:
        """Add the last token's B and x, which the next step weighs, and the sums of angles."""
        return super().operator_state_size(length) + self.heads * (self.key_dim + self.rotated_pairs) + self.value_width

    def mixing_flops(self, length: int) -> int:
        """Add the operations of Δ, A, λ and the angles."""
        return super().mixing_flops(length) + 2 * length * self.dim * (3 * self.heads + self.rotated_pairs)

    def operator_flops(self, length: int) -> int:
        """Return the operations of causal linear attention with decay in each direction."""
        directions = 2 if self.config.causality == "bidirectional" else 1
        one_direction = sum(
            operators.linear.flops(length, self.key_dim, width, "causal", "scalar") for width in self.value_widths
        )
        return directions * self.heads * one_direction

    @classmethod
    def convert_state_dict(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> ConvertedStateDict:
        """Convert the state dict of `mamba_ssm`'s or `fla`'s Mamba3; for fla's, pass rate="softplus".

        Pass n_groups (mamba_ssm: ngroups) if it is not 1. Not supported: several inputs and outputs (MIMO).
        """
        require_tensors(state, "in_proj.weight", "dt_bias", "B_bias", "C_bias", "B_norm.weight", "D", "out_proj.weight")
        heads, rank, d_state = state["B_bias"].shape
        if rank != 1:
            raise ValueError(f"Expected B_bias (h, 1, n) of a block with one input and output, got MIMO rank {rank}.")
        dim, inner = state["out_proj.weight"].shape
        key_width = d_state * (options.get("n_groups", 1) or heads)
        pairs = len(state["in_proj.weight"]) - 2 * (inner + key_width) - 3 * heads
        derived = {
            "expand": inner / dim,
            "d_state": d_state,
            "bias": "in_proj.bias" in state,
            "norm": "norm.weight" in state,
            "rope_fraction": 2 * pairs / d_state,
        }
        names = {"dt_bias": "decay.dt_bias", "D": "output.D", "norm.weight": "output.norm.weight"}
        names |= {f"out_proj.{kind}": f"projections.to_out.{kind}" for kind in ("weight", "bias")}
        tensors = {names.get(name, name): t for name, t in state.items() if not name.startswith("in_proj.")}
        tensors |= {name: state[name].squeeze(1) for name in ("B_bias", "C_bias")}
        parts = {
            "output.to_gate": inner,
            "projections.to_v": inner,
            "projections.to_k": key_width,
            "projections.to_q": key_width,
            "decay.to_dt": heads,
            "decay.to_rate": heads,
            "decay.to_trapezoid": heads,
            "decay.to_angles": pairs,
        }
        for kind in {"weight", "bias"} & {name.removeprefix("in_proj.") for name in state}:
            rows = split_rows(state, f"in_proj.{kind}", list(parts.values()))
            tensors |= {f"{part}.{kind}": r for part, r in zip(parts, rows, strict=True)}
        return ConvertedStateDict(dim, heads, derived | dict(options), tensors)


def _normalize(x: Tensor, norm: RMSNorm | None, bias: Tensor | None) -> Tensor:
    """Apply the norm and add the bias (h, n) to B or C, (b, l, h, n)."""
    x = x if norm is None else norm(x)
    return x if bias is None else x + bias.to(x.dtype)


def _past_operands(
    q: Tensor, k: Tensor, own: Tensor, carried: Tensor, log_decay: Tensor, angles: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries, keys and log decays of the sums over earlier tokens; `own` and `carried` are (b, l, h)."""
    if angles is not None:
        q = rotate_cumulatively(q, angles)
        k = rotate_cumulatively(k, angles)
    shares = own + advance_one_token(carried)
    queries = advance_one_token(q * log_decay.exp()[..., None])
    return queries, k * shares[..., None], log_decay
