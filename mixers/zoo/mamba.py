"""Mamba's selective state-space model, S6 (Gu and Dao 2023, 2312.00752)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers.config import MixerConfig
from mixers.entries import register_mixer
from mixers.feature_maps import FeatureMap
from mixers.image_grid import ImageGrid
from mixers.operators.scan import selective_scan, selective_scan_matrix
from mixers.precision import accumulation_dtype
from mixers.stages.decays import inverse_softplus_of_log_uniform
from mixers.stages.projections import FullPrecisionLinear, ProjectionLayers, Projections
from mixers.state_dicts import ConvertedStateDict, require_tensors, split_rows
from mixers.state_space_mixer import SELECTIONS, Selection, StateSpaceConfig, StateSpaceMixer
from mixers.streams import Streams
from mixers.suggest import unknown_name


@dataclass(frozen=True)
class MambaConfig(StateSpaceConfig):
    """Options of `mamba`.

    Attributes:
        selection: what B, C and Δ are computed from: `inner`, the inner activation after the convolution, as
            published; or `input`, the tokens.
        dt_rank: rank of Δ. None: ⌈d / 16⌉.
    """

    norm: bool = False
    d_state: int | None = 16
    selection: Selection = "inner"
    dt_rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selection not in SELECTIONS:
            raise ValueError(unknown_name("selection", self.selection, SELECTIONS))
        if self.dt_rank is not None and self.dt_rank <= 0:
            raise ValueError(f"Expected dt_rank > 0, or None for a sixteenth of the model width; got {self.dt_rank}.")


class LowRankStep(nn.Module):
    """The step size of each channel, Δ = softplus(up(down(x))): (b, l, width) -> (b, l, channels), float32 at least.

    Parameters, as published: `down.weight` (rank, width), the first rows of x_proj; `up.weight` (channels, rank) and
    `up.bias` (channels,), dt_proj. For x = 0, Δ is initially log-uniform between 0.001 and 0.1.

    Args:
        width: channels of the input.
        channels: number of step sizes.
        rank: width between the two layers.
    """

    def __init__(self, width: int, channels: int, rank: int) -> None:
        super().__init__()
        self.down = FullPrecisionLinear(width, rank, bias=False)
        self.up = FullPrecisionLinear(rank, channels)
        nn.init.uniform_(self.up.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            self.up.bias.copy_(inverse_softplus_of_log_uniform(channels, 1e-3, 1e-1))

    def forward(self, x: Tensor) -> Tensor:
        """Compute Δ."""
        return F.softplus(self.up(self.down(x)))


@register_mixer("mamba")
class Mamba(StateSpaceMixer):
    """Mamba (2312.00752): W_ij = Σ_n C_i[n] B_j[n] Δ_j ∏ exp(Δ_t A[n]) for every channel, then (W u + D u)·SiLU(z).

    u = SiLU(convolution(to_v(x))). One Δ per channel, one A per channel and state; heads are groups of channels. As
    published, B, C and Δ are computed from u, and all channels share B and C. The drop-in form computes them from x:
    B and C with the width of a head, one of each per head, and Δ of low rank for every channel. Of the scan, `flops`
    counts the reading of the states only: the rest, about 5·l·channels·n operations and exponentials, is elementwise.
    """

    Config: ClassVar[type[MixerConfig]] = MambaConfig
    has_decay: ClassVar[bool] = True
    drop_in_options: ClassVar[Mapping[str, Any]] = {**StateSpaceMixer.drop_in_options, "selection": "input"}
    output_options: ClassVar[Mapping[str, Any]] = {"skip_per_channel": True}

    config: MambaConfig

    def __init__(self, config: MambaConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        rates = torch.arange(1.0, self.key_dim + 1).log()
        self.A_log = nn.Parameter(rates.repeat(self.value_width, 1))
        self.rank = config.dt_rank or math.ceil(dim / 16)
        self.step = LowRankStep(self.selection_width, self.value_width, self.rank)

    @property
    def selection_width(self) -> int:
        """Channels from which B, C and Δ are computed."""
        return self.value_width if self.config.selection == "inner" else self.dim

    @property
    def convolved_width(self) -> int:
        """Channels of the short convolution: those of the values."""
        return self.value_width

    @property
    def A(self) -> Tensor:
        """(h, v, n), < 0."""
        log = self.A_log.to(accumulation_dtype(self.A_log)).unflatten(0, (self.heads, -1))
        return -log.exp()

    def create_projections(self) -> Projections:
        """Create the mixer's own projections, whose to_q and to_k see what `selection` names."""
        return self._create_biased_projections(("to_v",), self.selection_width)

    def compute_streams(self, x: Tensor, projections: ProjectionLayers, grid: ImageGrid | None = None) -> Streams:
        """Compute the inner activation u, then B, C and Δ from it or from the tokens."""
        u = projections.to_v(x)
        u = u if self.short_conv is None else self.short_conv(u, grid)
        source = u if self.config.selection == "inner" else x
        return Streams(
            x=x,
            q=self.split_key_heads(projections.to_q(source)),
            k=self.split_key_heads(projections.to_k(source)),
            v=self.split_heads(u),
            dt=self.split_heads(self.step(source)),
            grid=grid,
        )

    def map_features(self, streams: Streams, feature_map: FeatureMap) -> tuple[Tensor, Tensor]:
        """Compute φ(C) and φ(B), (b, l, h, n) each, float32 at least, without Δ, which the operator applies."""
        return super().map_features(replace(streams, dt=None), feature_map)

    def mix_directly(self, streams: Streams) -> Tensor:
        """Compute W u, (b, l, h, v), in float32 at least if unnormalized."""
        assert streams.dt is not None
        C, B = self.features(streams)
        u = streams.v if self.config.normalize else streams.values
        options = self._operator_options(streams) | {"backend": self.config.backend}
        return cast(Tensor, selective_scan(u, streams.dt, self.A, B, C, **options))

    def direct_matrix(self, streams: Streams) -> Tensor:
        """Compute W, (b, h, v, l, l), from its formula."""
        assert streams.dt is not None
        C, B = self.features(streams)
        return selective_scan_matrix(streams.dt, self.A, B, C, **self._operator_options(streams))

    def apply_unnormalized(self, streams: Streams, v: Tensor, positive: bool = False) -> Tensor:
        """Apply the weights before any normalization to values v (b, l, h, v): (b, l, h, v)."""
        assert streams.dt is not None
        C, B = self.signed_or_positive_features(streams, positive)
        options = self._unscaled_options() | {"backend": self.config.backend}
        sums = cast(Tensor, selective_scan(v, streams.dt, self.A, B, C, **options))
        return sums / v.shape[1] if self.averages_weights else sums

    def unnormalized_matrix(self, streams: Streams, positive: bool = False) -> Tensor:
        """Compute the matrix that `apply_unnormalized` applies, (b, h, v, l, l), from its formula."""
        assert streams.dt is not None
        C, B = self.signed_or_positive_features(streams, positive)
        matrix = selective_scan_matrix(streams.dt, self.A, B, C, eps=0.0, **self._unscaled_options())
        return matrix / C.shape[1] if self.averages_weights else matrix

    def apply_with_row_sums(self, streams: Streams, v: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the weights to v, and compute their row sums (b, l, h, v), of which every channel has its own."""
        return self.apply_unnormalized(streams, v), self.row_sums(streams, positive=False)

    def row_sums(self, streams: Streams, positive: bool) -> Tensor:
        """Compute the row sums of the weights, (b, l, h, v)."""
        return self.apply_unnormalized(streams, torch.ones_like(streams.values), positive)

    def operator_state_size(self, length: int) -> int:
        """Return channels·n, twice that if normalized, because every channel has its own row sums."""
        return self.value_width * self.key_dim * (1 + int(self.config.normalize)) + self.value_sum_size

    def projection_flops(self, length: int) -> int:
        """Return the share of `flops` of the four projections."""
        return 4 * length * (self.selection_width * self.key_width + self.dim * self.value_width)

    def mixing_flops(self, length: int) -> int:
        """Add the operations of Δ."""
        return super().mixing_flops(length) + 2 * length * self.rank * (self.selection_width + self.value_width)

    def operator_flops(self, length: int) -> int:
        """Return the operations of reading the states; everything else is elementwise."""
        size = self.operator_state_size(length) - self.value_sum_size
        return 2 * length * size * (2 if self.config.causality == "bidirectional" else 1)

    @classmethod
    def convert_state_dict(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> ConvertedStateDict:
        """Convert the state dict of `transformers`' MambaMixer or `mamba_ssm`'s Mamba.

        `heads` (default 1) splits the channels without any other effect.
        """
        required = "in_proj.weight conv1d.weight x_proj.weight dt_proj.weight dt_proj.bias A_log D out_proj.weight"
        require_tensors(state, *required.split())
        dim, inner = state["out_proj.weight"].shape
        d_state = state["A_log"].shape[-1]
        dt_rank = state["dt_proj.weight"].shape[-1]
        heads = options.get("heads", 1)
        derived = {
            "expand": inner / dim,
            "conv_size": state["conv1d.weight"].shape[-1],
            "bias": "in_proj.bias" in state,
            "d_state": d_state,
            "dt_rank": dt_rank,
        }
        names = {
            "A_log": "A_log",
            "conv1d.weight": "short_conv.weight",
            "conv1d.bias": "short_conv.bias",
            "out_proj.weight": "projections.to_out.weight",
            "out_proj.bias": "projections.to_out.bias",
            "dt_proj.weight": "step.up.weight",
            "dt_proj.bias": "step.up.bias",
        }
        tensors = {names.get(n, n): t for n, t in state.items() if not n.startswith(("in_proj.", "x_proj."))}
        tensors.setdefault("short_conv.bias", torch.zeros_like(state["conv1d.weight"][:, 0, 0]))
        tensors["output.D"] = tensors.pop("D").reshape(heads, -1)
        for kind in {"weight", "bias"} & {name.removeprefix("in_proj.") for name in state}:
            value, gate = split_rows(state, f"in_proj.{kind}", [inner, inner])
            tensors |= {f"projections.to_v.{kind}": value, f"output.to_gate.{kind}": gate}
        step, key, query = split_rows(state, "x_proj.weight", [dt_rank, d_state, d_state])
        tensors |= {"step.down.weight": step, "projections.to_k.weight": key, "projections.to_q.weight": query}
        overrides = {name: value for name, value in options.items() if name != "heads"}
        return ConvertedStateDict(dim, heads, derived | overrides, tensors)
