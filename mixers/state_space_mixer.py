"""Mixers in the terms of state-space models: C, B and x are queries, keys and values, and Δ scales the keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from mixers.config import MixerConfig
from mixers.linear_mixer import LinearConfig, LinearMixer
from mixers.normalization import append_ones, divide_by_last
from mixers.stages.projections import Projections
from mixers.streams import Streams
from mixers.traits import Causality

Selection = Literal["inner", "input"]
"""What a mixer computes queries and keys from: the inner activation after to_v and the convolution, or the tokens."""

SELECTIONS: tuple[Selection, ...] = get_args(Selection)


@dataclass(frozen=True)
class StateSpaceConfig(LinearConfig):
    """Options of every state-space mixer; the defaults are Mamba-2's.

    Attributes:
        d_state: n, channels of B and of C per group. None: the width of a head.
        n_groups: number of pairs of B and C, each shared by consecutive heads. None: one per head.
        bias: whether the projections have biases.
    """

    causality: Causality = "causal"
    normalize: bool = False
    expand: float = 2
    conv_size: int = 4
    skip: bool = True
    norm: bool = True
    gate: bool = True
    d_state: int | None = 128
    n_groups: int | None = 1
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(size is not None and size <= 0 for size in (self.d_state, self.n_groups)):
            raise ValueError(f"Expected d_state and n_groups > 0, got {self.d_state} and {self.n_groups}.")


class StateSpaceMixer(LinearMixer):
    """to_q computes C, to_k computes B and to_v computes x, as in the duality: W_ij = C_i·B_j L_ij."""

    Config: ClassVar[type[MixerConfig]] = StateSpaceConfig
    drop_in_options: ClassVar[Mapping[str, Any]] = {
        "expand": 1,
        "conv_size": 0,
        "skip": False,
        "norm": False,
        "gate": False,
        "d_state": None,
        "n_groups": None,
    }
    tiny_options: ClassVar[Mapping[str, Any]] = {"d_state": 4}

    config: StateSpaceConfig

    def __init__(self, config: StateSpaceConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        self.n_groups = config.n_groups or heads
        if heads % self.n_groups:
            raise ValueError(f"n_groups={self.n_groups} does not divide the {heads} heads, which share B and C evenly.")
        super().__init__(config, dim, heads, own_projections=own_projections)
        if config.bias and config.gate:
            self.output.to_gate = nn.Linear(dim, self.value_width)

    @property
    def key_dim(self) -> int:
        """n, channels of B and of C per group."""
        return self.config.d_state or self.head_dim

    @property
    def key_width(self) -> int:
        """Channels of B and of C of all groups."""
        return self.n_groups * self.key_dim

    @property
    def heads_per_group(self) -> int:
        """All heads if there is one group, and one if normalized or with temperatures.

        Normalized, Δ scales the keys of each head differently; otherwise it scales the values. A temperature is one
        factor per head.
        """
        shares = self.n_groups == 1 and not self.config.normalize and self.log_temperature is None
        return self.heads if shares else 1

    def create_projections(self) -> Projections:
        """Create the mixer's own projections, with biases if `bias` is set."""
        return self._create_biased_projections(("to_q", "to_k", "to_v"))

    def _create_biased_projections(self, biased: tuple[str, ...], key_input: int | None = None) -> Projections:
        """Create projections of which to_out, and those named in `biased`, have a bias if `bias` is set."""
        projections = Projections(self.dim, self.key_width, self.value_width, key_input, bias=self.config.bias)
        for name in biased if self.config.bias else ():
            layer = getattr(projections, name)
            setattr(projections, name, nn.Linear(layer.in_features, layer.out_features))
        return projections

    def split_key_heads(self, x: Tensor) -> Tensor:
        """Give each head the channels of its group, (b, l, groups·n) -> (b, l, h, n); a view if there is one group."""
        groups = x.unflatten(-1, (self.n_groups, 1, -1))
        return groups.expand(-1, -1, -1, self.heads // self.n_groups, -1).flatten(2, 3)


class MultiPassMixer(StateSpaceMixer):
    """A state-space mixer whose weights are a sum of parts, such as the past, the future and the own token.

    A subclass provides the sum: `apply_unnormalized` and `unnormalized_matrix`, unnormalized.
    """

    def mix_directly(self, streams: Streams) -> Tensor:
        """Compute W v, (b, l, h, v), in float32 at least."""
        if not self.config.normalize:
            return self.apply_unnormalized(streams, streams.values) * self.scale_at(streams.x.shape[1])
        return divide_by_last(self.apply_unnormalized(streams, append_ones(streams.values)), self.config.eps)

    def direct_matrix(self, streams: Streams) -> Tensor:
        """Compute W, (b, h, l, l), from its formula."""
        total = self.unnormalized_matrix(streams)
        if not self.config.normalize:
            return total * self.scale_at(streams.x.shape[1])
        return total / (total.sum(-1, keepdim=True) + self.config.eps)
