"""THE flow: tokens -> projections -> feature map -> operator -> normalization -> output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from mixers.stages.convolutions import ShortConvolution
from mixers.stages.outputs import Output
from mixers.stages.projections import Projections, apply_to_out
from mixers.stages.scan_orders import SCANS, inverse_permutation, scan_orders
from mixers.state_dicts import ConvertedStateDict
from mixers.suggest import hint
from mixers.traits import Causality, Traits


@dataclass(frozen=True)
class MixerConfig:
    """Base of every mixer's configuration; the defaults are the published ones. JSON-able.

    Every part is a switch of its own, so that an ablation can take one away or add one to any mixer.

    Attributes:
        causality: which tokens a token sees.
        normalize: divide by the row sum of the weights.
        scan: the order in which an image's tokens are read: `raster`, `column`, `cross` (both, averaged),
            `zigzag` or `hilbert`; of mixers that have an order.
        expand: width of the values over the model width; other than 1 it needs projections of its own.
        conv_size: tokens that a depthwise convolution and SiLU on q, k and v span; 0 is none. Causal mixers
            look back only, others to both sides.
        local_conv_size: side of a depthwise convolution of the values over the image that is added to the
            result; 0 is none. None becomes the published one, or 0 where the mixer is causal, which it would break.
        skip: add D · v to the result, D one number a head.
        norm: RMSNorm (or the mixer's own norm) of the result.
        gate: multiply the result by SiLU(to_gate(x)).
    """

    default_local_conv_size: ClassVar[int] = 0

    causality: Causality = "noncausal"
    normalize: bool = True
    scan: str = "raster"
    expand: float = 1
    conv_size: int = 0
    local_conv_size: int | None = None
    skip: bool = False
    norm: bool = False
    gate: bool = False

    def __post_init__(self) -> None:
        if self.local_conv_size is None:
            local = 0 if self.causality == "causal" else self.default_local_conv_size
            object.__setattr__(self, "local_conv_size", local)
        if self.scan not in SCANS:
            raise ValueError(f"Unknown scan {self.scan!r}: expected one of {', '.join(SCANS)}.{hint(self.scan, SCANS)}")
        if self.expand <= 0 or self.conv_size < 0 or (self.local_conv_size or 0) < 0:
            raise ValueError(
                f"Expected expand > 0, conv_size ≥ 0 and local_conv_size ≥ 0, got {self.expand}, "
                f"{self.conv_size} and {self.local_conv_size}."
            )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Streams:
    """What the stages after the projections work on.

    Attributes:
        x: the tokens themselves (b, l, d), in the order in which they are scanned.
        q, k: queries and keys before the feature map, (b, l, h, k).
        v: values, (b, l, h, v).
        log_decay: logarithms of the gates, ≤ 0, as the operator takes them; None without decay.
        dt: the step size Δ ≥ 0 of a state-space model, which scales the keys; (b, l, h[, v]).
        beta: the step size β ≥ 0 of the delta rule, (b, l, h).
        grid: (height, width) of the image, or None where nobody asked.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    dt: Tensor | None = None
    beta: Tensor | None = None
    grid: tuple[int, int] | None = None

    @property
    def values(self) -> Tensor:
        """v in float32 at least: unnormalized sums may pass what half precision holds before they are normed."""
        return self.v.to(upcast(self.v.dtype))


class TokenMixer(nn.Module):
    """Tokens (b, l, d) -> tokens (b, l, d). Subclasses choose the stages.

    The four projections are called, never copied: they are the mixer's own module `projections`, or the host's,
    handed to `forward`. What a mixer adds to them is its own.

    Subclasses set:
        Config: the frozen configuration, published defaults.
        drop_in_options: options of the form that starts from a host's projections, the defaults of
            `create_mixer(own_projections=False)`.
        tiny_options: options that make it small, for tests.
        output_options: how its result is normed and gated, as options of `stages.outputs.Output`.
        exceptions: {check: reason} of conformance checks that it is known to fail.
    """

    Config: ClassVar[Any] = MixerConfig
    drop_in_options: ClassVar[dict[str, Any]] = {}
    tiny_options: ClassVar[dict[str, Any]] = {}
    output_options: ClassVar[dict[str, Any]] = {}
    exceptions: ClassVar[dict[str, str]] = {}

    def __init__(self, config: Any, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__()
        self.config, self.dim, self.heads = config, dim, heads
        self._refuse_what_has_no_meaning(own_projections)
        self.projections = self.create_projections() if own_projections else None
        self.short_conv = (
            ShortConvolution(self.convolved_width, config.conv_size, causal=config.causality == "causal")
            if config.conv_size
            else None
        )
        self.output = Output(
            dim,
            heads,
            self.head_dim,
            skip=config.skip,
            norm=config.norm,
            gate=config.gate,
            local_conv_size=config.local_conv_size,
            **self.output_options,
        )

    def _refuse_what_has_no_meaning(self, own_projections: bool) -> None:
        config, name = self.config, type(self).__name__
        if self.permutation_equivariant and config.scan != "raster":
            raise ValueError(f"scan={config.scan!r} has no meaning here: {name} reads in no order.")
        if config.local_conv_size and (config.causality == "causal" or config.scan != "raster"):
            raise ValueError(
                f"local_conv_size={config.local_conv_size} sees neighbors on all sides of the image: it goes with "
                f"a mixer that is not causal and with scan='raster', not with causality={config.causality!r} and "
                f"scan={config.scan!r}."
            )
        widths, needed = (self.dim, self.dim), (self.key_width, self.value_width)
        if not own_projections and needed != widths:
            raise ValueError(
                f"A host's projections give queries and values of width {self.dim}, and this configuration of {name} "
                f"needs {needed[0]} and {needed[1]}: use the options of its drop-in form, {self.drop_in_options}."
            )

    @classmethod
    def convert_state_dict(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> ConvertedStateDict:
        """Read the state dict of the paper's own block, or of a library's; see `mixers.mixer_from_state_dict`.

        Args:
            state: its tensors, by their published names.
            options: what the caller says, for what shapes do not tell; a mixer may need `heads`.

        Raises:
            ValueError: there is no such loader, or the tensors are not those of such a block.
        """
        raise ValueError(f"{cls.__name__} has no published state dict to load.")

    @property
    def value_width(self) -> int:
        """Channels of the values, all heads together."""
        return round(self.dim * self.config.expand)

    @property
    def key_width(self) -> int:
        """Channels that to_q and to_k give."""
        return self.dim

    @property
    def convolved_width(self) -> int:
        """Channels that the short convolution sees: q, k and v."""
        return 2 * self.key_width + self.value_width

    @property
    def head_dim(self) -> int:
        """Value channels a head."""
        return self.value_width // self.heads

    @property
    def key_dim(self) -> int:
        """Key channels a head, before the feature map."""
        return self.key_width // self.heads

    def create_projections(self) -> Projections:
        """Projections for a mixer that is handed none."""
        return Projections(self.dim, self.key_width, self.value_width)

    def forward(self, x: Tensor, *, grid: tuple[int, int] | None = None, projections: Any = None) -> Tensor:
        """Mix tokens.

        Args:
            x: (b, l, d).
            grid: (height, width) with height · width = l, for mixers that scan in two dimensions.
            projections: anything with to_q, to_k, to_v and to_out; needed where the mixer has none of its own.

        Raises:
            ValueError: x is not (b, l, d), the grid does not fit or is missing, or there are no projections.
        """
        host = self.resolve_projections(projections)
        results = []
        for order in self.scan_orders(x, grid):
            streams = self.compute_streams(x if order is None else x[:, order], host, grid)
            y = self.output(self.mix(streams), streams).to(streams.v.dtype)  # mix may keep float32 for the norm
            results.append(y if order is None else y[:, inverse_permutation(order)])
        y = results[0] if len(results) == 1 else torch.stack(results).mean(0)
        return apply_to_out(host.to_out, rearrange(y, "b l h v -> b l (h v)"))

    def resolve_projections(self, projections: Any) -> Any:
        """The projections to call: those handed over, else the mixer's own."""
        chosen = self.projections if projections is None else projections
        if chosen is None:
            raise ValueError(
                f"{type(self).__name__} was built with own_projections=False: hand its forward `projections`, "
                "a module with to_q, to_k, to_v and to_out."
            )
        return chosen

    def scan_orders(self, x: Tensor, grid: tuple[int, int] | None) -> list[Tensor | None]:
        """The orders to read tokens x (b, l, d) in, (l,) each; None leaves them as they are."""
        if x.ndim != 3 or x.shape[-1] != self.dim or x.shape[1] == 0:
            raise ValueError(f"Expected tokens (b, l ≥ 1, {self.dim}), got {tuple(x.shape)}.")
        if grid is not None and grid[0] * grid[1] != x.shape[1]:
            raise ValueError(f"The grid {grid} has {grid[0] * grid[1]} places for {x.shape[1]} tokens.")
        return scan_orders(self.config.scan, grid, x.device)

    def projection_inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What to_q and to_k see, (b, l, d) each; the tokens themselves unless a mixer adds to them."""
        return x, x

    def compute_streams(self, x: Tensor, host: Any, grid: tuple[int, int] | None = None) -> Streams:
        """Projections, short convolution and gates: tokens (b, l, d), in scan order, -> what the operator takes."""
        for_q, for_k = self.projection_inputs(x)
        q, k, v = self.project(host, for_q, for_k, x)
        return self.add_gates(Streams(x, q, k, v, grid=grid))

    def project(self, host: Any, for_q: Tensor, for_k: Tensor, for_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the projections see (b, l, d) -> q, k (b, l, h, k) and v (b, l, h, v), after the short convolution."""
        q, k, v = host.to_q(for_q), host.to_k(for_k), host.to_v(for_v)
        if self.short_conv is not None:
            after_v, after_k = v.shape[-1], v.shape[-1] + k.shape[-1]
            v = self.short_conv(v)
            k, q = self.short_conv(k, after_v), self.short_conv(q, after_k)
        return self.split_key_heads(q), self.split_key_heads(k), self.split_heads(v)

    def add_gates(self, streams: Streams) -> Streams:
        """Add `log_decay`, `dt` and `beta`, for mixers that have them."""
        return streams

    def split_heads(self, x: Tensor) -> Tensor:
        """(b, l, h·c) -> (b, l, h, c)."""
        return rearrange(x, "b l (h c) -> b l h c", h=self.heads)

    def split_key_heads(self, x: Tensor) -> Tensor:
        """What to_q or to_k gave -> (b, l, h, k)."""
        return self.split_heads(x)

    def mix(self, streams: Streams) -> Tensor:
        """Feature map, operator and normalization -> (b, l, h, v), a new tensor; linear in the values."""
        raise NotImplementedError

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """The matrix that `mix` applies to the values, from its formula: (b, h, l, l), or (b, h, v, l, l)
        where every value channel has its own. Costs l² memory."""
        raise NotImplementedError

    @property
    def permutation_equivariant(self) -> bool:
        """Whether permuting the tokens permutes the output: no causality, decay, rotation or convolution."""
        config = self.config
        return config.causality != "causal" and not (config.conv_size or config.local_conv_size)

    @property
    def positive(self) -> bool:
        """Whether every weight is ≥ 0."""
        raise NotImplementedError

    @property
    def traits(self) -> Traits:
        """What this mixer, as configured, promises."""
        config = self.config
        return Traits(
            causality=config.causality,
            normalized=config.normalize,
            positive=self.positive,
            permutation_equivariant=self.permutation_equivariant,
            repetition_invariant=self.permutation_equivariant and config.normalize,
            linear=True,
            needs_grid=config.scan != "raster" or config.local_conv_size > 0,
        )

    def state_size(self, length: int) -> int:
        """Numbers a causal pass carries from token to token after `length` tokens."""
        raise NotImplementedError

    def flops(self, length: int) -> int:
        """Multiply-adds × 2 of one forward over `length` tokens, batch 1; elementwise work is not counted.

        A scan in several orders does everything but the output projection once for each.
        """
        once = 2 * length * self.dim * self.value_width
        a_pass = self.projection_flops(length) + self.mixing_flops(length) - once
        return len(SCANS[self.config.scan]) * a_pass + once

    def projection_flops(self, length: int) -> int:
        """The share of `flops` of the four projections."""
        return 4 * length * self.dim * (self.key_width + self.value_width)

    def mixing_flops(self, length: int) -> int:
        """The share of `flops` that is not the four projections."""
        config, width = self.config, self.value_width
        convolved = config.conv_size * self.convolved_width + config.local_conv_size**2 * width
        gate = self.dim * width if config.gate else 0
        return 2 * length * (convolved + gate) + self.operator_flops(length)

    def operator_flops(self, length: int) -> int:
        """The share of `flops` of the operator."""
        raise NotImplementedError


def upcast(dtype: torch.dtype) -> torch.dtype:
    """State and sums are float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def with_values(streams: Streams, v: Tensor) -> Streams:
    """The same streams with other values."""
    return replace(streams, v=v)
