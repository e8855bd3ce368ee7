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
        d_state: n, channels of B and C; None is the width of a head.
        n_groups: sets of B and C, which consecutive heads share; None is one a head.
        bias: whether the projections have one.
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
    """to_q gives C, to_k gives B and to_v gives x, as in the duality: W_ij = C_i·B_j L_ij."""

    Config: ClassVar[Any] = StateSpaceConfig
    drop_in_options: ClassVar[dict[str, Any]] = {
        **{"expand": 1, "conv_size": 0, "skip": False, "norm": False, "gate": False},
        **{"d_state": None, "n_groups": None},
    }
    tiny_options: ClassVar[dict[str, Any]] = {"d_state": 4}

    def __init__(self, config: Any, dim: int, heads: int, *, own_projections: bool = True) -> None:
        self.n_groups = config.n_groups or heads
        if heads % self.n_groups:
            raise ValueError(f"n_groups={self.n_groups} of B and C cannot be shared evenly by {heads} heads.")
        super().__init__(config, dim, heads, own_projections=own_projections)
        if config.bias and config.gate:
            self.output.to_gate = nn.Linear(dim, self.value_width)

    @property
    def key_dim(self) -> int:
        """n, channels of B and C."""
        return self.config.d_state or self.head_dim

    @property
    def key_width(self) -> int:
        """B and C of every group."""
        return self.n_groups * self.key_dim

    @property
    def heads_per_group(self) -> int:
        """All heads where there is one group; normalized, Δ is in the keys, which makes them a head's own."""
        return self.heads if self.n_groups == 1 and not self.config.normalize else 1

    def create_projections(self) -> Projections:
        """Projections for a mixer that is handed none."""
        return self.make_projections(("to_q", "to_k", "to_v"))

    def make_projections(self, biased: tuple[str, ...], key_input: int | None = None) -> Projections:
        """Projections to groups of B and C; with `bias` to_out and these have one."""
        made = Projections(self.dim, self.key_width, self.value_width, key_input, bias=self.config.bias)
        for name in biased if self.config.bias else ():
            old = getattr(made, name)
            setattr(made, name, nn.Linear(old.in_features, old.out_features))
        return made

    def split_key_heads(self, x: Tensor) -> Tensor:
        """(b, l, groups·n) -> (b, l, h, n), each group for its heads; of one group a view, which costs nothing."""
        shared = x.unflatten(-1, (self.n_groups, 1, -1)).expand(-1, -1, -1, self.heads // self.n_groups, -1)
        return shared.flatten(2, 3)
