"""Retention, RetNet's mixer (Sun et al. 2023, 2307.08621)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from mixers.config import MixerConfig
from mixers.entries import register_mixer
from mixers.linear_mixer import LinearConfig, LinearMixer
from mixers.stages.decays import FixedDecay
from mixers.stages.projections import Projections
from mixers.stages.rotary import rotary
from mixers.state_dicts import ConvertedStateDict, convert_fla_state_dict
from mixers.streams import Streams
from mixers.traits import Causality


@dataclass(frozen=True)
class RetNetConfig(LinearConfig):
    """Options of `retnet`.

    Attributes:
        rotary: rotate queries and keys by their position. None: as published, unless normalized, because rotated
            features are signed. Positions are those in the scan for every causality, so the result then always depends
            on the order.
        inclusive_angles: pair i of n rotates by 10000^(−i/(n−1)), as in the paper's code (torchscale); otherwise by
            10000^(−i/n), as in fla.
        first_exponent: γ of head h is 1 − 2^(−first_exponent − h).
    """

    causality: Causality = "causal"
    normalize: bool = False
    expand: float = 2
    conv_bias: bool = False
    norm: bool = True
    gate: bool = True
    rotary: bool | None = None
    inclusive_angles: bool = True
    first_exponent: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotary and self.normalize:
            raise ValueError(
                "normalize=True needs a positive feature map, and rotary=True makes features signed: use rotary=False, "
                "or None, which disables it for normalized mixers, or normalize=False."
            )

    @property
    def rotates(self) -> bool:
        """Whether queries and keys are rotated."""
        return not self.normalize if self.rotary is None else self.rotary


@register_mixer("retnet")
class RetNet(LinearMixer):
    """RetNet (2307.08621): W_ij = (R_i q_i)·(R_j k_j) γ^(i−j) / √k, with one fixed γ per head and a rotation R_t by t.

    Followed by RMSNorm per head, without weights, and multiplication by SiLU(to_gate(x)); no biases. Without an order,
    γ weighs all tokens alike.

    Deviations from the published block: the scaling of scores by their sums is left out, because the norm undoes it.
    Values are twice as wide as the model, as in the paper and in fla; the models of torchscale use 27/16. The norm's
    eps is 1e-5 instead of 1e-6, and the projections start as torch's linear layers, where torchscale draws them by
    Xavier with gain 2^−2.5 (to_out: 2^−1).
    """

    Config: ClassVar[type[MixerConfig]] = RetNetConfig
    has_decay: ClassVar[bool] = True
    drop_in_options: ClassVar[Mapping[str, Any]] = {"expand": 1, "rotary": False, "norm": False, "gate": False}
    output_options: ClassVar[Mapping[str, Any]] = {"affine": False}

    config: RetNetConfig

    def __init__(self, config: RetNetConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.decay = FixedDecay(heads, config.first_exponent)

    def create_projections(self) -> Projections:
        """Create the mixer's own projections, without biases."""
        return Projections(self.dim, self.key_width, self.value_width, bias=False)

    def add_gates(self, streams: Streams) -> Streams:
        """Add log γ, (h,)."""
        return replace(streams, log_decay=self.decay(streams.x))

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Compute φ(q) and φ(k), rotated: (b, l, h, k) each, float32 at least."""
        q, k = super().features(streams)
        if not self.config.rotates:
            return q, k
        inclusive = self.config.inclusive_angles
        return rotary(q, inclusive=inclusive), rotary(k, inclusive=inclusive)

    @property
    def scale(self) -> float:
        """1 / √k."""
        return self.key_dim**-0.5

    @property
    def permutation_equivariant(self) -> bool:
        """Whether permuting the tokens only permutes the output: not with rotation by position."""
        return super().permutation_equivariant and not self.config.rotates

    @property
    def positive(self) -> bool:
        """Whether no entry of the mixing matrix is negative: not with rotation, which makes features signed."""
        return super().positive and not self.config.rotates

    @classmethod
    def convert_state_dict(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> ConvertedStateDict:
        """Convert the state dict of `fla`'s MultiScaleRetention with queries as wide as the model.

        Pass heads if its norm has no weight. The norm's weight is folded into to_out, and channels are permuted so
        that rotated pairs are adjacent: the same map. Not supported: keys and values shared by heads, a feature map, a
        gate other than SiLU.
        """
        converted = convert_fla_state_dict(state, options, {})
        tensors = {name: t for name, t in converted.tensors.items() if name != "rotary.inv_freq"}
        norm = tensors.pop("output.norm.weight")
        tensors["projections.to_out.weight"] = tensors["projections.to_out.weight"] * norm.repeat(converted.heads)
        for name in ("projections.to_q.weight", "projections.to_k.weight"):
            tensors[name] = _interleave_pairs(tensors[name], converted.heads)
        for name in ("short_conv.weight", "short_conv.bias"):
            if name in tensors:
                v, k, q = tensors[name].split([len(state["v_proj.weight"]), converted.dim, converted.dim])
                k, q = (_interleave_pairs(t, converted.heads) for t in (k, q))
                tensors[name] = torch.cat([v, k, q])
        return replace(converted, options={"inclusive_angles": False} | converted.options, tensors=tensors)


def _interleave_pairs(rows: Tensor, heads: int) -> Tensor:
    """Permute rows so that the pairs (i, i + n) of each head become (2i, 2i + 1)."""
    return rearrange(rows, "(h pair n) ... -> (h n pair) ...", h=heads, pair=2)
