"""The flow of every mixer: tokens → projections → feature map → operator → normalization → output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from mixers.config import MixerConfig
from mixers.context import MixingContext
from mixers.context_mixing import ContextMixing
from mixers.image_grid import ImageGrid, check_grid
from mixers.stages.convolutions import ShortConvolution, ShortConvolution2d
from mixers.stages.outputs import Output
from mixers.stages.projections import ProjectionLayers, Projections, apply_to_out
from mixers.stages.scan_orders import inverse_permutation, scan_orders
from mixers.state_dicts import ConvertedStateDict
from mixers.streams import Streams


class TokenMixer(ContextMixing):
    """A layer that maps tokens (b, l, d) to tokens (b, l, d); each subclass chooses its stages.

    The four projections are called, never copied: a mixer used alone has its own, a mounted one is handed its host's.
    Everything else that a mixer computes with is its own.

    Class attributes that a subclass sets:
        Config: its frozen configuration; the defaults are the paper's. Annotate `config` with the same class.
        drop_in_options: options of the form that starts from a host's projections, without the parts that would
            start at random; the defaults of `create_mixer(own_projections=False)`.
        tiny_options: options that make it small, for tests.
        output_options: how the result is normalized and gated, passed to `stages.outputs.Output`.
        exceptions: {check: reason} of the conformance checks that the mixer is known to fail.
    """

    Config: ClassVar[type[MixerConfig]] = MixerConfig
    drop_in_options: ClassVar[Mapping[str, Any]] = {}
    tiny_options: ClassVar[Mapping[str, Any]] = {}
    output_options: ClassVar[Mapping[str, Any]] = {}
    exceptions: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: MixerConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        """Build the mixer.

        Args:
            config: an instance of `Config`.
            dim: model width d.
            heads: number of heads h; divides d.
            own_projections: create to_q, to_k, to_v and to_out; otherwise every forward is handed a host's.

        Raises:
            ValueError: The options contradict each other, or a host's projections do not have the widths they need.
        """
        super().__init__()
        self.config = config
        self.dim = dim
        self.heads = heads
        self._check_options(own_projections)
        self.projections = self.create_projections() if own_projections else None
        self.short_conv = self._create_short_conv()
        self.text_bias = nn.Parameter(torch.zeros(heads)) if config.text == "softmax" and self.weighs_text else None
        self.output_gain: Tensor | None
        self.register_buffer("output_gain", torch.ones(self.mixed_heads) if config.output_gain else None)
        self.output: nn.Module = Output(
            dim,
            self.mixed_heads,
            self.head_dim,
            skip=config.skip,
            norm=config.norm,
            gate=config.gate,
            local_conv_size=config.local_conv_size or 0,
            **self.output_options,
        )

    # The flow

    def forward(
        self,
        x: Tensor,
        *,
        grid: ImageGrid | None = None,
        projections: ProjectionLayers | None = None,
        context: MixingContext | None = None,
    ) -> Tensor:
        """Mix tokens.

        Args:
            x: (b, l, d).
            grid: (height, width) with height · width = l; required if `traits.needs_grid`.
            projections: an object with to_q, to_k, to_v and to_out; required if the mixer has none of its own.
            context: text, rotary embeddings and padding of a host's layer, as `config.text` and `config.rope` expect.

        Returns:
            Tokens (b, l, d).

        Raises:
            ValueError: x is not (b, l, d), the grid does not fit or is missing, or there are no projections.
        """
        projections = self.resolve_projections(projections)
        passes = [self._scan_once(x, order, projections, grid, context) for order in self.scan_orders(x, grid)]
        y = passes[0] if len(passes) == 1 else torch.stack(passes).mean(0)
        if self.output_gain is not None:
            y = (y * self.output_gain[:, None]).to(y.dtype)
        return apply_to_out(projections.to_out, rearrange(y, "b l h v -> b l (h v)"))

    def _scan_once(
        self,
        x: Tensor,
        order: Tensor | None,
        projections: ProjectionLayers,
        grid: ImageGrid | None,
        context: MixingContext | None,
    ) -> Tensor:
        """Mix tokens (b, l, d) in one scan order: (b, l, h, v), back in raster order."""
        streams = self.compute_streams(x if order is None else x[:, order], projections, grid)
        mixed = self.mix(streams) if context is None else self.mix_in_context(streams, context.reorder(order))
        y = self.finish(mixed, streams).to(streams.v.dtype)  # mix may keep float32 for the norm
        return y if order is None else y[:, inverse_permutation(order)]

    def compute_streams(self, x: Tensor, projections: ProjectionLayers, grid: ImageGrid | None = None) -> Streams:
        """Apply projections, short convolution and gates to tokens (b, l, d) in scan order."""
        query_input, key_input = self.projection_inputs(x)
        q, k, v = self.project(projections, query_input, key_input, x, grid)
        return self.add_gates(Streams(x, q, k, v, grid=grid))

    def projection_inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of to_q and of to_k, (b, l, d) each; the tokens themselves by default."""
        return x, x

    def project(
        self,
        projections: ProjectionLayers,
        query_input: Tensor,
        key_input: Tensor,
        value_input: Tensor,
        grid: ImageGrid | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project (b, l, d) to q and k (b, l, h, k) and v (b, l, h, v), through the short convolution if any."""
        q = projections.to_q(query_input)
        k = projections.to_k(key_input)
        v = projections.to_v(value_input)
        if self.short_conv is not None:
            first_key = v.shape[-1]
            first_query = first_key + k.shape[-1]
            v = self.short_conv(v, grid)
            k = self.short_conv(k, grid, first_key)
            q = self.short_conv(q, grid, first_query)
        return self.split_key_heads(q), self.split_key_heads(k), self.split_heads(v)

    def add_gates(self, streams: Streams) -> Streams:
        """Add `log_decay`, `dt` or `beta`; mixers that have them override this."""
        return streams

    def mix(self, streams: Streams) -> Tensor:
        """Apply feature map, operator and normalization.

        Returns:
            W v, (b, l, h, v), linear in the values if `traits.linear_in_values`. A new tensor: without gradients, the
            output stage overwrites it.
        """
        raise NotImplementedError

    def finish(self, y: Tensor, streams: Streams) -> Tensor:
        """Apply the output stage to the result of `mix`, (b, l, h, v).

        A mixer whose result has a part that does not depend on the values adds it here, so that `mix` is W v alone.
        """
        result: Tensor = self.output(y, streams)
        return result

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """Compute the matrix W that `mix` applies to the values, from its formula. Costs O(l²) memory.

        Returns:
            (b, h, l, l), or (b, h, v, l, l) if every value channel has its own matrix. Where `mix` is not linear in the
            values (`traits.linear_in_values`), its derivative ∂y_ic / ∂v_jc within every value channel c.
        """
        raise NotImplementedError

    @classmethod
    def convert_state_dict(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> ConvertedStateDict:
        """Convert the state dict of the paper's block, or of a library's; used by `mixers.mixer_from_state_dict`.

        Args:
            state: the block's tensors under their published names.
            options: options that the shapes do not determine; some mixers need `heads`.

        Raises:
            ValueError: The mixer has no converter, or the tensors are not those of such a block.
        """
        raise ValueError(f"{cls.__name__} cannot be built from a published state dict.")

    @classmethod
    def refuses_normalizer(cls, name: str) -> str | None:
        """Return why the mixer cannot be normalized that way, or None if it can; `row_sum` is never refused."""
        return "it computes its normalized rows in one way only"

    # Helpers of the flow

    def resolve_projections(self, projections: ProjectionLayers | None) -> ProjectionLayers:
        """Return the projections to call: those given, otherwise the mixer's own.

        Raises:
            ValueError: There are neither.
        """
        resolved = self.projections if projections is None else projections
        if resolved is None:
            raise ValueError(
                f"{type(self).__name__} was built with own_projections=False and received no projections: pass "
                "projections=, a module with to_q, to_k, to_v and to_out."
            )
        return resolved

    def create_projections(self) -> Projections:
        """Create the mixer's own projections."""
        return Projections(self.dim, self.key_width, self.value_width)

    def scan_orders(self, x: Tensor, grid: ImageGrid | None) -> list[Tensor | None]:
        """Return the orders in which to read tokens x (b, l, d), (l,) each; None is raster order.

        Raises:
            ValueError: x is not (b, l, d), or the grid does not fit or is missing.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim or x.shape[1] == 0:
            raise ValueError(f"Expected tokens (b, l ≥ 1, {self.dim}), got {tuple(x.shape)}.")
        if grid is not None:
            check_grid(grid, x.shape[1])
        return scan_orders(self.config.scan, grid, x.device)

    def _create_short_conv(self) -> ShortConvolution | ShortConvolution2d | None:
        config = self.config
        if not config.conv_size:
            return None
        if config.conv_2d:
            return ShortConvolution2d(self.convolved_width, config.conv_size, bias=config.conv_bias)
        causal = config.causality == "causal"
        return ShortConvolution(self.convolved_width, config.conv_size, causal=causal, bias=config.conv_bias)

    def split_heads(self, x: Tensor) -> Tensor:
        """Split channels into heads, (b, l, h·c) -> (b, l, h, c)."""
        return rearrange(x, "b l (h c) -> b l h c", h=self.mixed_heads)

    def split_key_heads(self, x: Tensor) -> Tensor:
        """Split the result of to_q or to_k into heads: (b, l, h, k)."""
        return self.split_heads(x)

    def _check_options(self, own_projections: bool) -> None:
        config = self.config
        name = type(self).__name__
        if self.permutation_equivariant and config.scan != "raster":
            raise ValueError(
                f"scan={config.scan!r} has no effect: the result of {name}, as configured, does not depend on the "
                "order of the tokens. Use scan='raster'."
            )
        for option, value in (("local_conv_size", config.local_conv_size), ("conv_2d", config.conv_2d)):
            if value and (config.causality == "causal" or config.scan != "raster"):
                raise ValueError(
                    f"{option}={value} needs a mixer that is not causal and scan='raster', because the window covers "
                    f"neighbors on all sides; got causality={config.causality!r} and scan={config.scan!r}."
                )
        self._check_context_options()
        if config.row_normalizer not in (None, config.default_normalizer):
            reason = self.refuses_normalizer(str(config.row_normalizer))
            if reason is not None:
                raise ValueError(f"{name} does not support normalizer={config.row_normalizer!r}: {reason}.")
        required_widths = (self.key_width, self.value_width)
        if not own_projections and required_widths != (self.dim, self.dim):
            raise ValueError(
                f"{name} with these options needs queries of width {self.key_width} and values of width "
                f"{self.value_width}, but a host's projections have width {self.dim}. Use the options of its drop-in "
                f"form: {dict(self.drop_in_options)}."
            )
