"""Mamba's selective state-space model, S6 (Gu and Dao 2023, 2312.00752)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers.mixer import Streams
from mixers.operators.scan import selective_scan, selective_scan_weights
from mixers.precision import accumulation_dtype
from mixers.registry import register_mixer
from mixers.stages.projections import Projections, linear_in_full_precision
from mixers.state_dicts import ConvertedStateDict, require_tensors, split_rows
from mixers.state_space_mixer import StateSpaceConfig, StateSpaceMixer
from mixers.suggest import hint

SELECTIONS = ("inner", "input")


@dataclass(frozen=True)
class MambaConfig(StateSpaceConfig):
    """Options of `mamba`.

    Attributes:
        selection: what B, C and Δ are computed from: `inner`, the inner activation after the convolution, as
            published; or `input`, the tokens.
        dt_rank: rank of Δ; None is ⌈d / 16⌉.
    """

    norm: bool = False
    d_state: int | None = 16
    selection: str = "inner"
    dt_rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selection not in SELECTIONS:
            expected = " or ".join(SELECTIONS)
            raise ValueError(
                f"Unknown selection {self.selection!r}: expected {expected}.{hint(self.selection, SELECTIONS)}"
            )
        if self.dt_rank is not None and self.dt_rank <= 0:
            raise ValueError(f"Expected dt_rank > 0, or None for a sixteenth of the model width; got {self.dt_rank}.")


class LowRankStep(nn.Module):
    """Δ = softplus(up(down(x))), one a channel: (b, l, width) -> (b, l, channels), float32 at least.

    Parameters, as published: `down.weight` (rank, width), the first rows of x_proj; `up.weight` (channels, rank) and
    `up.bias` (channels,), dt_proj. With x = 0, Δ starts log-uniform between 0.001 and 0.1.
    """

    def __init__(self, width: int, channels: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, channels)
        nn.init.uniform_(self.up.weight, -(rank**-0.5), rank**-0.5)
        dt = torch.empty(channels).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        with torch.no_grad():
            self.up.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, width) -> (b, l, channels)."""
        return F.softplus(linear_in_full_precision(self.up, linear_in_full_precision(self.down, x)))


@register_mixer("mamba")
class Mamba(StateSpaceMixer):
    """Mamba (2312.00752): W_ij = Σ_n C_i[n] B_j[n] Δ_j ∏ exp(Δ_t A[n]) for every channel, then (W u + D u)·SiLU(z).

    u = SiLU(convolution(to_v(x))). One Δ a channel, one A a channel and state; heads are splits of the channels. As
    published B, C and Δ come from u, and B and C are the same for all channels. The drop-in form takes them from x: B
    and C with the width of a head, one of each a head, and Δ at low rank for every channel. Of the scan `flops` has
    the reading of the states alone: the rest, about 5·l·channels·n operations and exponentials, is elementwise.
    """

    Config: ClassVar[Any] = MambaConfig
    has_decay: ClassVar[bool] = True
    drop_in_options: ClassVar[dict[str, Any]] = {**StateSpaceMixer.drop_in_options, "selection": "input"}
    output_options: ClassVar[dict[str, Any]] = {"skip_channels": True}

    def __init__(self, config: Any, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        rates = torch.arange(1.0, self.key_dim + 1).log()
        self.A_log = nn.Parameter(rates.repeat(self.value_width, 1))
        self.rank = config.dt_rank or math.ceil(dim / 16)
        self.step = LowRankStep(self.selection_width, self.value_width, self.rank)

    @property
    def selection_width(self) -> int:
        """Channels of what B, C and Δ are computed from."""
        return self.value_width if self.config.selection == "inner" else self.dim

    @property
    def convolved_width(self) -> int:
        """Channels that the short convolution sees: those of the values."""
        return self.value_width

    @property
    def A(self) -> Tensor:
        """(h, v, n), < 0."""
        log = self.A_log.to(accumulation_dtype(self.A_log)).unflatten(0, (self.heads, -1))
        return -log.exp()

    def create_projections(self) -> Projections:
        """Projections whose to_q and to_k see what `selection` says."""
        return self.make_projections(("to_v",), self.selection_width)

    def compute_streams(self, x: Tensor, host: Any, grid: tuple[int, int] | None = None) -> Streams:
        """The inner activation, and B, C and Δ of it or of the tokens."""
        u = host.to_v(x)
        u = u if self.short_conv is None else self.short_conv(u)
        source = u if self.config.selection == "inner" else x
        q, k = self.split_key_heads(host.to_q(source)), self.split_key_heads(host.to_k(source))
        return Streams(x, q, k, self.split_heads(u), dt=self.split_heads(self.step(source)), grid=grid)

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """φ(C) and φ(B), (b, l, h, n) each, float32 at least; Δ is the operator's own."""
        return super().features(replace(streams, dt=None))

    def mix(self, streams: Streams) -> Tensor:
        """W u, (b, l, h, v)."""
        assert streams.dt is not None
        C, B = self.features(streams)
        settings = self._settings() | {"backend": self.config.backend}
        return cast(Tensor, selective_scan(streams.v, streams.dt, self.A, B, C, **settings))

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """(b, h, v, l, l), from the formula."""
        assert streams.dt is not None
        C, B = self.features(streams)
        return selective_scan_weights(streams.dt, self.A, B, C, **self._settings())

    def state_size(self, length: int) -> int:
        """channels·n, twice that normalized: every channel has weights of its own, and so their sum."""
        return self.value_width * self.key_dim * (1 + int(self.config.normalize))

    def projection_flops(self, length: int) -> int:
        """The share of `flops` of the four projections."""
        return 4 * length * (self.selection_width * self.key_width + self.dim * self.value_width)

    def mixing_flops(self, length: int) -> int:
        """Those of convolution, gate and operator, and Δ's."""
        return super().mixing_flops(length) + 2 * length * self.rank * (self.selection_width + self.value_width)

    def operator_flops(self, length: int) -> int:
        """The reading of the states; all else is elementwise."""
        return 2 * length * self.state_size(length) * (2 if self.config.causality == "bidirectional" else 1)

    @classmethod
    def convert_state_dict(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> ConvertedStateDict:
        """Of `transformers`' MambaMixer or `mamba_ssm`'s Mamba; `heads` (default 1) splits the channels, no more."""
        require_tensors(
            state, "in_proj.weight conv1d.weight x_proj.weight dt_proj.weight dt_proj.bias A_log D out_proj.weight"
        )
        (dim, inner), states = state["out_proj.weight"].shape, state["A_log"].shape[-1]
        rank, size = state["dt_proj.weight"].shape[-1], state["conv1d.weight"].shape[-1]
        heads = options.get("heads", 1)
        derived = {
            **{"expand": inner / dim, "conv_size": size, "bias": "in_proj.bias" in state},
            **{"d_state": states, "dt_rank": rank},
            **{name: value for name, value in options.items() if name != "heads"},
        }
        names = {"conv1d.weight": "short_conv.conv.weight", "conv1d.bias": "short_conv.conv.bias"}
        names |= {"out_proj.weight": "projections.to_out.weight", "out_proj.bias": "projections.to_out.bias"}
        names |= {"dt_proj.weight": "step.up.weight", "dt_proj.bias": "step.up.bias"}
        found = {names.get(n, n): t for n, t in state.items() if not n.startswith(("in_proj.", "x_proj."))}
        found.setdefault(names["conv1d.bias"], torch.zeros_like(state["conv1d.weight"][:, 0, 0]))
        found["output.D"] = found.pop("D").reshape(heads, -1)
        cuts: dict[str, tuple[str, ...]] = {"in_proj.weight": ("projections.to_v.weight", "output.to_gate.weight")}
        cuts |= {"in_proj.bias": ("projections.to_v.bias", "output.to_gate.bias")}
        cuts |= {"x_proj.weight": ("step.down.weight", "projections.to_k.weight", "projections.to_q.weight")}
        for name, parts in cuts.items():
            if name in state:
                rows = split_rows(state, name, [rank, states, states] if name == "x_proj.weight" else [inner, inner])
                found |= dict(zip(parts, rows, strict=True))
        return ConvertedStateDict(dim, heads, derived, found)
