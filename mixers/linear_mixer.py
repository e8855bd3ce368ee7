"""Mixers whose operator is `linear_attention`: a feature map, gates if any, and sums over tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from mixers import operators
from mixers.config import MixerConfig
from mixers.feature_maps import FEATURE_MAPS, FeatureMap, feature_map
from mixers.linear_context import LinearContext, divide
from mixers.normalization import count_visible_tokens
from mixers.precision import accumulation_dtype
from mixers.streams import Streams
from mixers.suggest import unknown_name
from mixers.traits import Traits

Scale = Literal["constant", "mean"]
SCALES: tuple[Scale, ...] = ("constant", "mean")


@dataclass(frozen=True)
class LinearConfig(MixerConfig):
    """Options of every mixer on `linear_attention`.

    Attributes:
        feature_map: φ = ψ, a key of `FEATURE_MAPS`. None: the paper's, except that rows which are divided by their
            sums need a positive map, elu+1 if the paper's is signed, and that the numerator of `decoupled` is signed,
            with the identity.
        eps: added to the denominator: without decay to the mean visible weight, with decay to the decayed sum.
        backend: implementation of the operator.
        scale: factor of unnormalized weights. `constant`: a constant of the mixer, whatever the number of tokens l.
            `mean`: the constant times reference_length / l, so that the row sums of a non-causal mixer stay bounded
            although rows are not normalized: the control that separates the two.
        reference_length: the number of tokens for which both scales are equal.
        temperature: multiply q and k by a learned factor per head, initially 1, before the feature map, for hosts that
            give all queries and keys the same length. None: False, or True in a layer that norms q and k if the feature
            map is not homogeneous.
    """

    feature_map: str | None = None
    eps: float = 1e-6
    backend: str = "auto"
    scale: Scale = "constant"
    reference_length: int = 256
    temperature: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps <= 0:
            raise ValueError(f"Expected eps > 0, got {self.eps}: a query whose features are all zero would give 0 / 0.")
        check_scale(self.scale, self.reference_length, normalize=self.normalize, causal=self.causality == "causal")


def check_scale(scale: str, reference_length: int, *, normalize: bool, causal: bool) -> None:
    """Raise ValueError if the options `scale` and `reference_length` have no meaning for a mixer."""
    if scale not in SCALES:
        raise ValueError(unknown_name("scale", scale, SCALES))
    if reference_length <= 0:
        raise ValueError(f"Expected reference_length > 0, got {reference_length}.")
    if scale == "mean" and normalize:
        raise ValueError("scale='mean' scales unnormalized weights: use it with normalize=False.")
    if scale == "mean" and causal:
        raise ValueError(
            "scale='mean' divides by the number of tokens, which a causal mixer does not know before the last one: "
            "use causality='noncausal', or scale='constant'."
        )


class LinearMixer(LinearContext):
    """W = (φ(q) φ(k)ᵀ) ⊙ L; subclasses provide the gates, if any, and the scale.

    Class attributes that a subclass sets:
        default_feature_map: the feature map of the paper.
        has_decay: whether `add_gates` sets a log decay.
        per_channel_decay: whether every key channel has its own gate.
        computes_sums: whether `sums` is what `mix_directly` computes; by default False for a subclass with a `mix` or
            `mix_directly` of its own.

    Attributes:
        log_temperature: (2, h), logarithms of the factors of q and of k; None without `temperature`.
    """

    Config: ClassVar[type[MixerConfig]] = LinearConfig
    default_feature_map: ClassVar[str] = "identity"
    has_decay: ClassVar[bool] = False
    per_channel_decay: ClassVar[bool] = False
    computes_sums: ClassVar[bool] = True

    config: LinearConfig

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if {"mix", "mix_directly"} & vars(cls).keys() and "computes_sums" not in vars(cls):
            cls.computes_sums = False

    def __init__(self, config: LinearConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        self.feature_map: FeatureMap = feature_map(
            self.feature_map_name(config), normalize=config.row_normalizer == "row_sum"
        )
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.log_temperature = nn.Parameter(torch.zeros(2, heads)) if config.temperature else None

    @classmethod
    def benefits_from_temperature(cls, config: Any) -> bool:
        """Whether a factor of q and k changes more than the scale of the features."""
        return not FEATURE_MAPS[cls.feature_map_name(config)].homogeneous

    @classmethod
    def feature_map_name(cls, config: Any) -> str:
        """Return the feature map in effect: the one configured, else the paper's if it suits the normalizer."""
        if config.feature_map is not None:
            return str(config.feature_map)
        if config.row_normalizer == "decoupled":
            return "identity"
        suitable = FEATURE_MAPS[cls.default_feature_map].positive or config.row_normalizer != "row_sum"
        return cls.default_feature_map if suitable else "elu_plus_one"

    def mix_directly(self, streams: Streams) -> Tensor:
        """Compute W v, (b, l, h, v), in float32 at least if unnormalized."""
        if streams.rotation is not None or streams.visible is not None:
            return divide(*self.sums(streams))
        q, k, v, feature_map = self.operands(streams)
        options = self._operator_options(streams) | {"feature_map": feature_map, "backend": self.config.backend}
        return cast(Tensor, operators.linear_attention(q, k, v, streams.log_decay, **options))

    def direct_matrix(self, streams: Streams) -> Tensor:
        """Compute W, (b, h, l, l), from its formula."""
        q, k = self.features(streams)
        return operators.linear_attention_matrix(q, k, streams.log_decay, **self._operator_options(streams))

    def apply_unnormalized(self, streams: Streams, v: Tensor, positive: bool = False) -> Tensor:
        """Apply the weights before any normalization to values v (b, l, h, ·): (b, l, h, ·)."""
        q, k = self.signed_or_positive_features(streams, positive)
        options = self._unscaled_options() | {"backend": self.config.backend}
        sums = cast(Tensor, operators.linear_attention(q, k, v, streams.log_decay, **options))
        return sums / count_visible_tokens(v, self.causality)[:, None, None] if self.averages_weights else sums

    def unnormalized_matrix(self, streams: Streams, positive: bool = False) -> Tensor:
        """Compute the matrix that `apply_unnormalized` applies, (b, h, l, l), from its formula."""
        q, k = self.signed_or_positive_features(streams, positive)
        matrix = operators.linear_attention_matrix(q, k, streams.log_decay, eps=0.0, **self._unscaled_options())
        return matrix / count_visible_tokens(q, self.causality)[:, None] if self.averages_weights else matrix

    def signed_or_positive_features(self, streams: Streams, positive: bool) -> tuple[Tensor, Tensor]:
        """Return the mixer's own features of q and k, or those by relu, (b, l, h, k) each."""
        if positive:
            return self.map_features(streams, FEATURE_MAPS["relu"])
        q, k = self.features(streams)
        return (q, k) if streams.rotation is None else (streams.rotation(q), streams.rotation(k))

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Compute φ(q) and φ(k), the latter times `dt` if there is one: (b, l, h, k) each, float32 at least."""
        return self.map_features(streams, self.feature_map)

    def map_features(self, streams: Streams, feature_map: FeatureMap) -> tuple[Tensor, Tensor]:
        """Compute the features of q and k by a feature map, without rotary embeddings: (b, l, h, k) each."""
        dtype = accumulation_dtype(streams.q)
        q = feature_map.apply(self.scaled_q(streams).to(dtype))
        k = feature_map.apply(self.scaled_k(streams.k).to(dtype))
        return q, k if streams.dt is None else k * streams.dt[..., None]

    def operands(self, streams: Streams) -> tuple[Tensor, Tensor, Tensor, str]:
        """Return q, k and v, and the feature map that the operator applies to q and k.

        An operator that applies the map while it reads q and k never writes the features to memory. The map is
        `identity` if `features` has to be computed beforehand, because it does more than apply a map. Otherwise q and k
        that all heads share have one head, so that the operator computes their products once.
        """
        dt = streams.dt
        normalize = self.config.normalize
        v = streams.v if normalize else streams.values
        methods = (type(self).features, type(self).map_features)
        computed = methods != (LinearMixer.features, LinearMixer.map_features)
        if computed or (normalize and dt is not None):
            q, k = self.features(streams)
            return q, k, v, "identity"
        # Unnormalized, scaling keys or scaling values by dt is equivalent.
        v = v if dt is None else v * dt[..., None]
        q = self.scaled_q(streams)
        k = self.scaled_k(streams.k)
        if self.heads_per_group == self.heads:
            q = q[:, :, :1]
            k = k[:, :, :1]
        return q, k, v, self.feature_map_name(self.config)

    def scaled_q(self, streams: Streams) -> Tensor:
        """Return q times its temperature, (b, l, h, k)."""
        return streams.q if self.log_temperature is None else _scale_heads(streams.q, self.log_temperature[0])

    def scaled_k(self, k: Tensor) -> Tensor:
        """Return keys (b, l, h, k) times their temperature."""
        return k if self.log_temperature is None else _scale_heads(k, self.log_temperature[1])

    @property
    def scale(self) -> float:
        """Factor of unnormalized weights, a constant of the mixer."""
        return 1.0

    @property
    def score_scale(self) -> float:
        """The scale of unnormalized weights, at `reference_length` tokens where these are means."""
        return self.scale if self.has_decay else self.scale * self.config.reference_length

    @property
    def eps(self) -> float:
        """Added to denominators."""
        return self.config.eps

    @property
    def averages_weights(self) -> bool:
        """Whether unnormalized weights are means over tokens, because no decay with an order bounds their sums."""
        return not (self.has_decay and self.config.causality != "noncausal")

    def scale_at(self, length: Any) -> Any:
        """Return the factor of unnormalized weights among `length` tokens: a number, or a tensor for a tensor.

        Where decay does not bound the sums, because without an order there is none, the constant is divided by
        reference_length, as that of linear attention is.
        """
        config = self.config
        unbounded = self.has_decay and config.causality == "noncausal"
        scale = self.scale / config.reference_length if unbounded else self.scale
        return scale if config.scale == "constant" else scale * config.reference_length / length

    def _operator_options(self, streams: Streams) -> dict[str, Any]:
        config = self.config
        return {
            "causality": config.causality,
            "normalize": config.normalize,
            "eps": config.eps,
            "scale": self.scale_at(streams.x.shape[1]),
        }

    def _unscaled_options(self) -> dict[str, Any]:
        return {"causality": self.config.causality, "normalize": False, "scale": 1.0}

    @property
    def permutation_equivariant(self) -> bool:
        """Whether permuting the tokens only permutes the output; decay has an order unless the mixer is non-causal."""
        return super().permutation_equivariant and not (self.has_decay and self.config.causality == "bidirectional")

    @property
    def traits(self) -> Traits:
        """The properties of this mixer as configured; scale="mean" too makes repeated tokens count once."""
        traits = super().traits
        invariant = traits.repetition_invariant or (self.permutation_equivariant and self.config.scale == "mean")
        return replace(traits, repetition_invariant=invariant)

    @property
    def positive(self) -> bool:
        """Whether no entry of the mixing matrix is negative: whether the feature map is positive.

        Subtracting a mean gives negative entries.
        """
        return self.feature_map.positive and self.config.row_normalizer != "subtract"

    @property
    def features_dim(self) -> int:
        """Channels per head after the feature map."""
        return self.key_dim

    @property
    def heads_per_group(self) -> int:
        """Number of heads that share one q and one k."""
        return 1

    def operator_state_size(self, length: int) -> int:
        """Return h·k·v, or h·k·(v + 1) if normalized, whatever the number of tokens; `subtract` adds h·v."""
        return self.heads * self.features_dim * sum(self.value_widths) + self.value_sum_size

    def operator_flops(self, length: int) -> int:
        """Return the operations of two products of l × k by k × v, and with an order of those within chunks.

        With an order, row sums are one more column of the products; otherwise they are elementwise work.
        """
        causality = self.config.causality
        ordered = causality == "causal" or (causality == "bidirectional" and self.has_decay)
        fused = self.divides_by_row_sums and not ordered
        decay = "none" if not self.has_decay else "vector" if self.per_channel_decay else "scalar"
        flops = 0
        for width in (self.head_dim,) if fused else self.value_widths:
            flops += operators.linear.flops(length, self.features_dim, width, causality, decay, self.heads_per_group)
        return self.heads * flops


def _scale_heads(x: Tensor, log_factor: Tensor) -> Tensor:
    """Multiply (b, l, h, k) by exp of (h,)."""
    return x * log_factor.exp()[:, None].to(x.dtype)
