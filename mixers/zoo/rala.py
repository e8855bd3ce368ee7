"""RALA: rank-augmented linear attention (Fan et al. 2024, 2411.07635)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from mixers import operators
from mixers.config import MixerConfig
from mixers.context import RotaryPlacement
from mixers.entries import register_mixer
from mixers.stages.projections import Projections
from mixers.stages.rotary import rotary_2d
from mixers.streams import Streams
from mixers.traits import Traits
from mixers.zoo.linear_attention import LinearAttention, LinearAttentionConfig


@dataclass(frozen=True)
class RALAConfig(LinearAttentionConfig):
    """Options of `rala`.

    Attributes:
        reweight_keys: multiply every key by α, so that the state gains rank; without it, all keys count alike.
        qkv_bias: whether to_q, to_k and to_v have a bias.
        rotary: rotate the features of q and k by the row and the column of their token.
    """

    default_local_conv_size: ClassVar[int] = 5

    gate: bool = True
    reweight_keys: bool = True
    qkv_bias: bool = True
    rotary: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotary and self.scan != "raster":
            raise ValueError(
                f"rotary=True rotates by positions in the image, in raster order, but scan={self.scan!r}: use "
                "scan='raster' or rotary=False."
            )


@register_mixer(
    "rala",
    causalities=("noncausal",),
    unsupported={
        "causal": "the mean query over all tokens weighs every key; a causal mean would give each query weights of its "
        "own, in O(l²) time",
        "bidirectional": "without an order, two passes are the non-causal form",
    },
)
class RALA(LinearAttention):
    """RALA (2411.07635): Y = (W V + LePE(V)) · to_gate(x), W_ij = α_j Rφ(q_i)·Rφ(k_j) / (φ(q_i)·mean α φ(k)).

    α_j = l · softmax_j(mean φ(q)·φ(k_j) / √k): the mean query weighs the keys, whose mean weight is 1. φ = elu + 1; R
    rotates half of each head by the row and half by the column. LePE is a 5 × 5 depthwise convolution over the image;
    the gate has no SiLU. The denominator is computed without R: rows sum to one and entries are ≥ 0 only with
    rotary=False, and `traits` says so. Unnormalized, W is the rotated product over √k · reference_length.

    The drop-in form has neither LePE nor gate.

    Deviations from the published block: its layers start as torch's, where the published models draw weights from a
    normal distribution of deviation 0.02 and start biases at zero.
    """

    Config: ClassVar[type[MixerConfig]] = RALAConfig
    drop_in_options: ClassVar[Mapping[str, Any]] = {"local_conv_size": 0, "gate": False}
    output_options: ClassVar[Mapping[str, Any]] = {"gate_activation": "identity", "gate_bias": True}

    config: RALAConfig

    def create_projections(self) -> Projections:
        """Create the mixer's own projections."""
        return Projections(self.dim, self.key_width, self.value_width, qkv_bias=self.config.qkv_bias)

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Compute φ(q) and α φ(k), without rotation: (b, l, h, k) each, float32 at least."""
        q, k = super().features(streams)
        return q, k * self.key_weights(q, k) if self.config.reweight_keys else k

    def key_weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Compute α of every key from the features of q and k (b, l, h, k): (b, l, h, 1), 1 on average."""
        scores = (k * q.mean(1, keepdim=True)).sum(-1, keepdim=True) * self.key_dim**-0.5
        return scores.softmax(1) * k.shape[1]

    def mix(self, streams: Streams) -> Tensor:
        """Compute W v, (b, l, h, v), in float32 at least."""
        q, k = self.features(streams)
        v = streams.values
        options = self._sum_options(v.shape[1]) | {"backend": self.config.backend}
        y = operators.linear_attention(*self._rotate(q, k, streams), v, **options)
        assert isinstance(y, Tensor)
        return y / self._denominators(q, k) if self.config.normalize else y

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """Compute W, (b, h, l, l), from its formula."""
        q, k = self.features(streams)
        options = self._sum_options(q.shape[1])
        matrix = operators.linear_attention_matrix(*self._rotate(q, k, streams), eps=0.0, **options)
        if not self.config.normalize:
            return matrix
        sums = operators.linear_attention_matrix(q, k, eps=0.0, **options).sum(-1, keepdim=True)
        return matrix / (sums + self.config.eps)

    def _sum_options(self, length: int) -> dict[str, Any]:
        """Return the options of plain sums: means if the rows are normalized later."""
        scale = 1 / length if self.config.normalize else self.scale_at(length)
        return {"causality": self.config.causality, "normalize": False, "scale": scale}

    def _denominators(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the mean weight of every row before rotation, plus eps: (b, l, h, 1)."""
        return (q * k.mean(1, keepdim=True)).sum(-1, keepdim=True) + self.config.eps

    def _rotate(self, q: Tensor, k: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        if not self.config.rotary:
            return q, k
        return rotary_2d(q, streams.grid, inclusive=True), rotary_2d(k, streams.grid, inclusive=True)

    @property
    def rotary_placements(self) -> dict[RotaryPlacement, str | None]:
        """For every value of `rope`: None if it is supported, otherwise the reason."""
        if not self.config.rotary:
            return super().rotary_placements
        reason = "it rotates by positions of its own; pass rotary=False"
        return {"after_map": reason, "before_map": reason}

    @property
    def permutation_equivariant(self) -> bool:
        """Whether permuting the tokens only permutes the output: not with rotation by position."""
        return super().permutation_equivariant and not self.config.rotary

    @property
    def positive(self) -> bool:
        """Whether no entry of the mixing matrix is negative: not with rotation, which makes features signed."""
        return super().positive and not self.config.rotary

    @property
    def traits(self) -> Traits:
        """The properties of this mixer as configured."""
        traits = super().traits
        rotary = self.config.rotary
        return replace(
            traits,
            normalized=traits.normalized and not rotary,
            needs_grid=traits.needs_grid or rotary,
            pairwise=not self.config.reweight_keys,
        )

    def operator_flops(self, length: int) -> int:
        """Return the operations of linear attention; the weights of keys and the denominators are elementwise work."""
        return self.heads * operators.linear.flops(length, self.key_dim, self.head_dim, "noncausal", "none")
