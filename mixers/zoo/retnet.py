"""Retention, RetNet's mixer (Sun et al. 2023, 2307.08621)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from mixers.linear_mixer import LinearConfig, LinearMixer
from mixers.mixer import Streams
from mixers.registry import register_mixer
from mixers.stages.decays import FixedDecay
from mixers.stages.projections import Projections
from mixers.stages.rotary import rotary
from mixers.state_dicts import ConvertedStateDict, convert_fla_state_dict
from mixers.traits import Causality


@dataclass(frozen=True)
class RetNetConfig(LinearConfig):
    """Options of `retnet`.

    Attributes:
        rotary: turn queries and keys by their place; None does, as published, unless normalized: turned channels are
            signed. Places are those in the scan, of every causality: the mixer then always has an order.
        first_exponent: γ of head h is 1 − 2^(−first_exponent − h).
    """

    causality: Causality = "causal"
    normalize: bool = False
    expand: float = 2
    norm: bool = True
    gate: bool = True
    rotary: bool | None = None
    first_exponent: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotary and self.normalize:
            raise ValueError(
                "normalize=True needs weights ≥ 0, and rotary=True makes them signed: use rotary=False (or None, which "
                "is off where normalized), or normalize=False."
            )

    @property
    def turns(self) -> bool:
        """Whether queries and keys are turned."""
        return not self.normalize if self.rotary is None else self.rotary


@register_mixer("retnet")
class RetNet(LinearMixer):
    """RetNet (2307.08621): W_ij = (R_i q_i)·(R_j k_j) γ^(i−j) / √k, one fixed γ a head, R_t a rotation by t.

    Then RMSNorm, one a head and without weights, times SiLU(to_gate(x)); no biases. The paper's scaling of scores by
    their sums is left out: that norm undoes it. Without an order γ weighs all tokens alike.
    """

    Config: ClassVar[Any] = RetNetConfig
    has_decay: ClassVar[bool] = True
    drop_in_options: ClassVar[dict[str, Any]] = {"expand": 1, "rotary": False, "norm": False, "gate": False}
    output_options: ClassVar[dict[str, Any]] = {"affine": False}

    def __init__(self, config: Any, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.decay = FixedDecay(heads, config.first_exponent)

    def create_projections(self) -> Projections:
        """Projections without a bias."""
        return Projections(self.dim, self.key_width, self.value_width, bias=False)

    def add_gates(self, streams: Streams) -> Streams:
        """Add log γ, (h,)."""
        return replace(streams, log_decay=self.decay(streams.x))

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """φ(q) and φ(k), turned: (b, l, h, k) each, float32 at least."""
        q, k = super().features(streams)
        return (rotary(q), rotary(k)) if self.config.turns else (q, k)

    @property
    def scale(self) -> float:
        """1 / √k."""
        return self.key_dim**-0.5

    @property
    def permutation_equivariant(self) -> bool:
        """Whether permuting the tokens permutes the output: not where places turn them."""
        return super().permutation_equivariant and not self.config.turns

    @property
    def positive(self) -> bool:
        """Whether every weight is ≥ 0: the feature map's are, unless turned."""
        return super().positive and not self.config.turns

    @classmethod
    def convert_state_dict(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> ConvertedStateDict:
        """Of `fla`'s MultiScaleRetention; say heads where its norm has no weight. Queries as wide as the model.

        The norm's weight goes into to_out, and channels into the order in which ours are turned: the same map.
        Not read: keys and values that heads share, a feature map, a gate other than SiLU.
        """
        read = convert_fla_state_dict(state, options, {})
        found = {name: t for name, t in read.state.items() if name != "rotary.inv_freq"}
        norm, out = found.pop("output.norm.weight"), "projections.to_out.weight"
        found[out] = found[out] * norm.repeat(read.heads)
        for name in ("projections.to_q.weight", "projections.to_k.weight"):
            found[name] = _pairs_side_by_side(found[name], read.heads)
        for name in ("short_conv.conv.weight", "short_conv.conv.bias"):
            if name in found:
                v, k, q = found[name].split([len(state["v_proj.weight"]), read.dim, read.dim])
                found[name] = torch.cat([v, *(_pairs_side_by_side(t, read.heads) for t in (k, q))])
        return replace(read, state=found)


def _pairs_side_by_side(rows: Tensor, heads: int) -> Tensor:
    """Rows of pairs (i, i + n) of each head -> rows of pairs (2i, 2i + 1)."""
    return rearrange(rows, "(h pair n) ... -> (h n pair) ...", h=heads, pair=2)
