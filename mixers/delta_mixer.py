"""Mixers whose operator is `delta_rule`: keys of unit norm, a step size per token and head, and gates if any."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from torch import Tensor

from mixers import operators
from mixers.config import MixerConfig
from mixers.context import RotaryPlacement
from mixers.feature_maps import FEATURE_MAPS, FeatureMap, feature_map
from mixers.normalized_mixer import NormalizedMixer
from mixers.precision import accumulation_dtype
from mixers.stages.projections import FullPrecisionLinear, Projections
from mixers.streams import Streams
from mixers.traits import Causality, Traits


@dataclass(frozen=True)
class DeltaConfig(MixerConfig):
    """Options of every mixer on `delta_rule`.

    Attributes:
        expand_k: width of queries and keys over the model width, rounded to whole channels per head. Other than 1, the
            mixer needs its own projections.
        allow_neg_eigval: β ranges up to 2 instead of 1, so that a token can flip the sign of what is stored under its
            key (2411.12537).
        feature_map: φ, a key of `FEATURE_MAPS`, applied before q and k are scaled to norm 1. None: the identity, or
            elu+1 if rows are divided by their sums.
        eps: added to the denominators if normalized.
        backend: implementation of the operator.
    """

    causality: Causality = "causal"
    normalize: bool = False
    conv_size: int = 4
    conv_bias: bool = False
    norm: bool = True
    gate: bool = True
    expand_k: float = 1
    allow_neg_eigval: bool = False
    feature_map: str | None = None
    eps: float = 1e-6
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expand_k <= 0 or self.eps <= 0:
            raise ValueError(f"Expected expand_k > 0 and eps > 0, got {self.expand_k} and {self.eps}.")
        divides = self.row_normalizer in ("row_sum", "decoupled")
        if divides and self.allow_neg_eigval and self.causality != "noncausal":
            raise ValueError(
                "allow_neg_eigval=True needs normalize=False, normalizer='subtract' or causality='noncausal': with "
                "β > 1 a token takes away more than is stored under its key, and row sums of ordinary sequences can be "
                "negative."
            )


class DeltaMixer(NormalizedMixer):
    """S_t = (I − β_t k_t k_tᵀ) Diag(α_t) S_{t−1} + β_t k_t v_tᵀ, y_t = q_tᵀ S_t / √k, with q and k of norm 1.

    β = σ(to_beta(x)). Subclasses provide the gates α in `log_decay`, if any.

    Normalized, q and k pass through a positive map first, and rows are divided by their sums, which are what the same
    rule reads if the target is 1 instead of v (SANA-WM, 2605.15178). Non-causal, the rule takes one step on all tokens
    at once; `mixers.operators.delta_rule` has the formulas.

    Class attributes that a subclass sets:
        per_channel_decay: whether every key channel has its own gate.
    """

    Config: ClassVar[type[MixerConfig]] = DeltaConfig
    per_channel_decay: ClassVar[bool] = False

    config: DeltaConfig

    def __init__(self, config: DeltaConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        name = self.feature_map_name(config)
        self.feature_map: FeatureMap = feature_map(name, normalize=config.row_normalizer == "row_sum")
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.to_beta = FullPrecisionLinear(dim, heads, bias=False)

    @classmethod
    def feature_map_name(cls, config: Any) -> str:
        """Return the feature map in effect: the one configured, else the identity, or a positive one to divide by."""
        return config.feature_map or ("elu_plus_one" if config.row_normalizer == "row_sum" else "identity")

    @property
    def key_width(self) -> int:
        """expand_k · d, rounded to whole channels per head."""
        return self.heads * max(1, round(self.dim * self.config.expand_k / self.heads))

    def create_projections(self) -> Projections:
        """Create the mixer's own projections, without biases."""
        return Projections(self.dim, self.key_width, self.value_width, bias=False)

    def add_gates(self, streams: Streams) -> Streams:
        """Add β, (b, l, h), and the log decay."""
        beta = self.to_beta(streams.x).sigmoid()
        beta = 2 * beta if self.config.allow_neg_eigval else beta
        return replace(streams, beta=beta, log_decay=self.log_decay(streams.x))

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Compute the log decay of tokens (b, l, d): (b, l, h), (b, l, h, k), or None without decay."""
        return None

    def hide_tokens(self, streams: Streams, visible: Tensor) -> Streams:
        """Return streams whose hidden tokens write nothing and let nothing decay; without an order, see the base."""
        if self.config.causality == "noncausal":
            return super().hide_tokens(streams, visible)
        assert streams.beta is not None
        log_decay = streams.log_decay
        if log_decay is not None:
            log_decay = log_decay.masked_fill(~visible.view(*visible.shape, *(1 for _ in log_decay.shape[2:])), 0)
        beta = streams.beta.masked_fill(~visible[..., None], 0)
        return replace(streams, beta=beta, log_decay=log_decay, visible=visible)

    @property
    def rotary_placements(self) -> dict[RotaryPlacement, str | None]:
        """For every value of `rope`: None if it is supported, otherwise the reason."""
        rotates_in_denominator = self.feature_map.positive or self.config.row_normalizer == "decoupled"
        after = "its numerator and its denominator are not computed apart" if rotates_in_denominator else None
        return {"after_map": after, "before_map": None}

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Compute φ(q) and φ(k), scaled to norm 1, (b, l, h, k) each, float32 at least; zero stays zero."""
        return self._unit_features(streams, self.feature_map)

    def _unit_features(self, streams: Streams, feature_map: FeatureMap) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(streams.q)
        q = feature_map.apply(streams.q.to(dtype))
        k = feature_map.apply(streams.k.to(dtype))
        return _unit_norm(q), _unit_norm(k)

    def mix_directly(self, streams: Streams) -> Tensor:
        """Compute W v, (b, l, h, v), in float32 at least."""
        assert streams.beta is not None
        q, k = self.features(streams)
        options = self._operator_options() | {"backend": self.config.backend}
        mixed = operators.delta_rule(q, k, streams.values, streams.beta, streams.log_decay, **options)
        return cast(Tensor, mixed)

    def direct_matrix(self, streams: Streams) -> Tensor:
        """Compute W, (b, h, l, l), from its formula."""
        assert streams.beta is not None
        q, k = self.features(streams)
        return operators.delta_rule_matrix(q, k, streams.beta, streams.log_decay, **self._operator_options())

    def apply_unnormalized(self, streams: Streams, v: Tensor, positive: bool = False) -> Tensor:
        """Apply the rule before any normalization to values v (b, l, h, ·): (b, l, h, ·)."""
        assert streams.beta is not None
        q, k = self._unit_features(streams, FEATURE_MAPS["relu"] if positive else self.feature_map)
        causality = self.config.causality
        mixed = operators.delta_rule(
            q, k, v, streams.beta, streams.log_decay, causality=causality, backend=self.config.backend
        )
        return cast(Tensor, mixed)

    def unnormalized_matrix(self, streams: Streams, positive: bool = False) -> Tensor:
        """Compute the matrix that `apply_unnormalized` applies, (b, h, l, l), from its formula."""
        assert streams.beta is not None
        q, k = self._unit_features(streams, FEATURE_MAPS["relu"] if positive else self.feature_map)
        causality = self.config.causality
        return operators.delta_rule_matrix(q, k, streams.beta, streams.log_decay, causality=causality, scale=1.0)

    def _operator_options(self) -> dict[str, Any]:
        config = self.config
        return {
            "causality": config.causality,
            "normalize": config.normalize,
            "eps": config.eps,
            "scale": self.scale,
        }

    @property
    def scale(self) -> float:
        """1 / √k, the factor of unnormalized weights."""
        return self.key_dim**-0.5

    @property
    def score_scale(self) -> float:
        """1 / √k."""
        return self.scale

    @property
    def eps(self) -> float:
        """Added to denominators."""
        return self.config.eps

    @property
    def permutation_equivariant(self) -> bool:
        """Whether permuting the tokens only permutes the output: only non-causal, because erasing depends on order."""
        return super().permutation_equivariant and self.config.causality == "noncausal"

    @property
    def positive(self) -> bool:
        """False: erasing makes entries of the mixing matrix negative."""
        return False

    @property
    def traits(self) -> Traits:
        """The properties of this mixer as configured; without an order, all tokens together erase, by their mean."""
        pairwise = self.config.causality != "noncausal"
        return replace(super().traits, repetition_invariant=self.permutation_equivariant, pairwise=pairwise)

    def operator_state_size(self, length: int) -> int:
        """Return h·k·v, or h·k·(v + 1) if normalized; `subtract` adds h·v."""
        return self.heads * self.key_dim * sum(self.value_widths) + self.value_sum_size

    def mixing_flops(self, length: int) -> int:
        """Add the operations of β."""
        return super().mixing_flops(length) + 2 * length * self.dim * self.heads

    def operator_flops(self, length: int) -> int:
        """Return the operations of the delta rule in blocks, without its triangular solves."""
        decay = "vector" if self.per_channel_decay else "scalar"
        flops = 0
        for width in self.value_widths:
            flops += operators.delta.flops(length, self.key_dim, width, self.config.causality, decay)
        return self.heads * flops


def _unit_norm(x: Tensor) -> Tensor:
    """Return x / √(|x|² + 1e-6) over the channels."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
