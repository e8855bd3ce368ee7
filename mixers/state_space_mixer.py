"""Mixers in the terms of state-space models: C, B and x for queries, keys and values, the latter two times Δ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from mixers.linear_mixer import LinearConfig, LinearMixer
from mixers.stages.projections import Projections
from mixers.traits import Causality


@dataclass(frozen=True)
class StateSpaceConfig(LinearConfig):
    """Options of every state-space mixer; the defaults are Mamba-2's.

    Attributes:
        state_size: n, channels of B and C; None is the width of a head.
        groups: sets of B and C, which consecutive heads share; None is one a head.
        bias: whether the projections have one.
    """

    causality: Causality = "causal"
    normalize: bool = False
    expand: float = 2
    short_convolution: int = 4
    skip: bool = True
    norm: bool = True
    gate: bool = True
    state_size: int | None = 128
    groups: int | None = 1
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(size is not None and size <= 0 for size in (self.state_size, self.groups)):
            raise ValueError(f"Expected state_size and groups > 0, got {self.state_size} and {self.groups}.")


class StateSpaceMixer(LinearMixer):
    """to_q gives C, to_k gives B and to_v gives x, as in the duality: W_ij = C_i·B_j L_ij."""

    Config: ClassVar[Any] = StateSpaceConfig
    plain: ClassVar[dict[str, Any]] = {
        **{"expand": 1, "short_convolution": 0, "skip": False, "norm": False, "gate": False},
        **{"state_size": None, "groups": None},
    }
    tiny: ClassVar[dict[str, Any]] = {"state_size": 4}

    def __init__(self, config: Any, dim: int, heads: int, *, own_projections: bool = True) -> None:
        self.groups = config.groups or heads
        if heads % self.groups:
            raise ValueError(f"groups={self.groups} of B and C cannot be shared evenly by {heads} heads.")
        super().__init__(config, dim, heads, own_projections=own_projections)
        if config.bias and config.gate:
            self.output.to_gate = nn.Linear(dim, self.value_width)

    @property
    def key_dim(self) -> int:
        """n, channels of B and C."""
        return self.config.state_size or self.head_dim

    @property
    def key_width(self) -> int:
        """B and C of every group."""
        return self.groups * self.key_dim

    @property
    def sharing(self) -> int:
        """All heads where there is one group; normalized, Δ is in the keys, which makes them a head's own."""
        return self.heads if self.groups == 1 and not self.config.normalize else 1

    def own_projections(self) -> Projections:
        """Projections for a mixer that is handed none."""
        return self.make_projections(("to_q", "to_k", "to_v"))

    def make_projections(self, biased: tuple[str, ...], key_input: int | None = None) -> Projections:
        """Projections to groups of B and C; with `bias` to_out and these have one."""
        made = Projections(self.dim, self.key_width, self.value_width, key_input, bias=self.config.bias)
        for name in biased if self.config.bias else ():
            old = getattr(made, name)
            setattr(made, name, nn.Linear(old.in_features, old.out_features))
        return made

    def split_keys(self, x: Tensor) -> Tensor:
        """(b, l, groups·n) -> (b, l, h, n), each group for its heads; of one group a view, which costs nothing."""
        shared = x.unflatten(-1, (self.groups, 1, -1)).expand(-1, -1, -1, self.heads // self.groups, -1)
        return shared.flatten(2, 3)
