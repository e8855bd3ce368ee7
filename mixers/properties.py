"""Widths, traits and costs of a mixer: what follows from its configuration alone."""

from __future__ import annotations

from torch import nn

from mixers.config import MixerConfig
from mixers.stages.scan_orders import SCANS
from mixers.traits import Traits


class MixerProperties(nn.Module):
    """Base of `TokenMixer` with everything that is a number or a promise; subclasses override what differs.

    Attributes:
        config: the mixer's options.
        dim: model width d.
        heads: number of heads h.
    """

    config: MixerConfig
    dim: int
    heads: int

    @property
    def value_width(self) -> int:
        """Value channels of all heads together: expand · d, rounded to whole channels per head."""
        return self.heads * max(1, round(self.dim * self.config.expand / self.heads))

    @property
    def key_width(self) -> int:
        """Output channels of to_q and of to_k."""
        return self.dim

    @property
    def convolved_width(self) -> int:
        """Channels of the short convolution: those of v, k and q."""
        return 2 * self.key_width + self.value_width

    @property
    def mixed_heads(self) -> int:
        """Heads of q, k, v and the result: h; more if a mixer adds heads of another kind."""
        return self.heads

    @property
    def head_dim(self) -> int:
        """Value channels per head."""
        return self.value_width // self.mixed_heads

    @property
    def key_dim(self) -> int:
        """Key channels per head, before the feature map."""
        return self.key_width // self.mixed_heads

    # Traits and costs

    @property
    def permutation_equivariant(self) -> bool:
        """Whether permuting the tokens only permutes the output: no causality, decay, rotation or convolution."""
        config = self.config
        return config.causality != "causal" and not (config.conv_size or config.local_conv_size)

    @property
    def positive(self) -> bool:
        """Whether no entry of the mixing matrix is negative."""
        raise NotImplementedError

    @property
    def traits(self) -> Traits:
        """The properties of this mixer as configured."""
        config = self.config
        return Traits(
            causality=config.causality,
            normalized=config.row_normalizer in ("row_sum", "subtract"),
            positive=self.positive,
            permutation_equivariant=self.permutation_equivariant,
            repetition_invariant=self.permutation_equivariant and config.normalize,
            linear=True,
            needs_grid=config.scan != "raster" or bool(config.local_conv_size) or bool(config.conv_2d),
        )

    def state_size(self, length: int) -> int:
        """Return how many numbers a causal pass carries to the next token after `length` tokens.

        Besides the state of the operator, these are the tokens in the window of a causal convolution.
        """
        config = self.config
        window = max(0, config.conv_size - 1) if config.causality == "causal" else 0
        return self.operator_state_size(length) + window * self.convolved_width

    def operator_state_size(self, length: int) -> int:
        """Return the share of `state_size` of the operator."""
        raise NotImplementedError

    def flops(self, length: int) -> int:
        """Return the floating-point operations of a forward over `length` tokens, batch 1.

        A multiply-add counts as two; elementwise work is not counted. A scan in several orders repeats everything but
        the output projection.
        """
        to_out = 2 * length * self.dim * self.value_width
        one_pass = self.projection_flops(length) + self.mixing_flops(length) - to_out
        return len(SCANS[self.config.scan]) * one_pass + to_out

    def projection_flops(self, length: int) -> int:
        """Return the share of `flops` of the four projections."""
        return 4 * length * self.dim * (self.key_width + self.value_width)

    def mixing_flops(self, length: int) -> int:
        """Return the share of `flops` that is not the four projections."""
        config = self.config
        window = config.conv_size**2 if config.conv_2d else config.conv_size
        convolutions = window * self.convolved_width + (config.local_conv_size or 0) ** 2 * self.value_width
        gate = self.dim * self.value_width if config.gate else 0
        return 2 * length * (convolutions + gate) + self.operator_flops(length)

    def operator_flops(self, length: int) -> int:
        """Return the share of `flops` of the operator."""
        raise NotImplementedError
